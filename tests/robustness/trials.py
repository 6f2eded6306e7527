"""Kills, damage and broken input in bulk: `python -m tests.robustness.trials kills|damage|fuzz`.

kills: a distillation or a sequence is killed with SIGKILL, at a random moment or at a random file
operation of a checkpoint, up to three times, and then goes on to its end, whose weights are
compared with those of a run that nobody killed. damage: files of the newest checkpoint are spoilt
in five ways, then the same. fuzz: image files, lists of captions, checkpoints and arguments are
spoilt at random; each must be read rightly or refused by name, and nothing may hang. Written are
`results/robustness_kills.json`, `..._damage.json` and `..._fuzz.json`, with the number of trials.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

import kdc
import kdc.io
from kdc.continual.sequence import run_sequence
from kdc.continual.strategies import STRATEGIES
from kdc.continual.tasks import Task
from kdc.data.images import FORMATS, read_image
from kdc.data.latents import LatentDataset
from kdc.io import fingerprint
from kdc.pipelines import with_unet
from kdc.training import checkpoints
from kdc.training.settings import TrainSettings
from studies.common import ledger
from tests.helpers import draws_counted, picture

STEPS, SAVE_EVERY = 24, 5
REFUSALS = (ValueError, TypeError, OSError, FloatingPointError)


def narrow():
    """The mini teacher around a U-Net so narrow that a step takes hundredths of a second."""
    teacher = kdc.load_teacher("mini", device="cpu")
    config = dict(teacher.unet.config) | {
        "block_out_channels": (8, 16, 16, 16),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(config)
    return with_unet(teacher, unet)


def latents(pipeline, seed: int) -> LatentDataset:
    """Random latents with captions of the right width."""
    g = torch.Generator().manual_seed(seed)
    width = pipeline.unet.config.cross_attention_dim
    return LatentDataset(
        torch.randn(12, 4, 16, 16, generator=g),
        torch.rand(12, 4, 16, 16, generator=g) * 0.1,
        torch.randn(3, 8, width, generator=g),
        torch.arange(12) % 3,
        torch.zeros(8, width),
        ["a", "b", "c"],
    )


def run(kind: str, pipeline, folder: Path | None, resume: bool) -> str:
    """Train to the end; a fingerprint of the weights and of what was measured."""
    settings = {"batch_size": 2, "save_every": SAVE_EVERY, "precision": "no", "log_every": 4}
    student = kdc.slim(pipeline.unet, "kdc")
    if kind == "distill":
        data = latents(pipeline, 1)
        log = kdc.distill(
            student, pipeline, data, steps=STEPS, output_dir=folder, resume=resume, **settings
        )
        measured = log["loss"].tolist()
    else:
        tasks = [Task(f"task {t}", latents(pipeline, t)) for t in range(3)]

        def evaluate(probed, task):
            x = torch.full((2,), 300)
            with torch.no_grad():
                out = probed.unet(task.train.mean[:2], x, task.train.embeddings[:2]).sample
            return {"error": out.square().mean().item()}

        result = run_sequence(
            tasks,
            kind,
            student,
            pipeline,
            evaluate=evaluate,
            higher_is_better={"error": False},
            buffer=kdc.ReplayBuffer(8, seed=3) if STRATEGIES[kind].mechanism.uses_buffer else None,
            steps=STEPS // 3,
            output_dir=folder,
            resume=resume,
            **settings | {"save_every": 3},
        )
        measured = result.matrix.values.tolist()
    weights = fingerprint(*(p.detach() for p in student.parameters()))
    return f"{weights} {json.dumps(measured)}"


KINDS = ("distill", "replay", "agem", "last_sample")


def _in_child(work: Callable[[], str], answer: Path) -> int:
    """Fork, do the work there, and leave its answer in a file; the child's process number."""
    child = os.fork()
    if child:
        return child
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("always")
            with warnings.catch_warnings(record=True) as caught:
                said = work()
            notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        answer.write_text(json.dumps({"answer": said, "warned": notes}))
        os._exit(0)
    except BaseException as error:
        answer.write_text(
            json.dumps({"error": f"{type(error).__name__}: {error}", "at": traceback.format_exc()})
        )
        os._exit(1)


def finished(work: Callable[[], str], seconds: float = 300) -> dict:
    """What the work gives in a process of its own; an error too, and one that hangs is killed."""
    answer = Path(tempfile.mkstemp()[1])
    child = _in_child(work, answer)
    end = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"error": f"hung for {seconds} seconds"}
        time.sleep(0.01)
    text = answer.read_text()
    answer.unlink()
    return json.loads(text) if text else {"error": "ended without an answer"}


@contextlib.contextmanager
def dying(at: int | None, torn: bool = False):
    """Count the file operations of checkpoints, and die by SIGKILL at the given one.

    `torn` leaves half of what was written before. Yields the list of operations.
    """
    done: list[str] = []
    places = [
        (kdc.io, "sync"),
        (kdc.io, "save_file"),
        (checkpoints, "save_file"),
        (checkpoints, "sync"),
        (pathlib.Path, "rename"),
        (pathlib.Path, "replace"),
        (pathlib.Path, "write_text"),
        (shutil, "rmtree"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]

    def counted(original, name):
        @functools.wraps(original)
        def call(*args, **kwargs):
            done.append(name)
            if len(done) == at:
                if torn and name == "sync" and Path(args[0]).is_file():
                    os.truncate(args[0], os.path.getsize(args[0]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for owner, name, original in originals:
        setattr(owner, name, counted(original, name))
    try:
        yield done
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _killed(kind, pipeline, folder, inside, draw, operations, seconds) -> bool:
    """Let a run go on until it is killed; whether it was."""
    answer = Path(tempfile.mkstemp()[1])
    at, torn = draw.randint(1, operations), draw.random() < 0.5

    def work():
        with dying(at if inside else None, torn):
            return run(kind, pipeline, folder, True)

    child = _in_child(work, answer)
    if not inside:
        time.sleep(draw.uniform(0, 0.7 * seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    answer.unlink()
    return os.WIFSIGNALED(status)


def kills(count: int, seed: int) -> list[dict]:
    """`count` runs, each killed one to three times, and what came of them."""
    draw, pipeline, rows = random.Random(seed), narrow(), []
    whole, operations, seconds = {}, {}, {}
    for kind in KINDS:
        folder = Path(tempfile.mkdtemp())
        whole[kind] = finished(lambda kind=kind: run(kind, pipeline, None, False))["answer"]

        def counting(kind=kind, folder=folder):
            with dying(None) as done:
                run(kind, pipeline, folder, False)
            return str(len(done))

        started = time.perf_counter()
        operations[kind] = int(finished(counting)["answer"])
        seconds[kind] = time.perf_counter() - started
        shutil.rmtree(folder)
    for number in range(count):
        kind, folder = KINDS[number % len(KINDS)], Path(tempfile.mkdtemp())
        inside = number % 2 == 0
        deaths, wanted = 0, draw.randint(1, 3)
        for _ in range(10 * wanted):
            if _killed(kind, pipeline, folder, inside, draw, operations[kind], seconds[kind]):
                deaths += 1
                if deaths == wanted:
                    break
            elif deaths:
                break  # through before another death came
            else:  # through before its first: it does not count
                shutil.rmtree(folder)
                folder.mkdir()
        end = finished(lambda kind=kind, folder=folder: run(kind, pipeline, folder, True))
        left = [p.name for p in folder.rglob("*.partial")]
        rows.append(
            {
                "run": kind,
                "killed": "at a file operation" if inside else "at any moment",
                "deaths": deaths,
                "equal": end.get("answer") == whole[kind],
                "left behind": len(left),
                "error": end.get("error"),
            }
        )
        shutil.rmtree(folder)
    return rows


def _flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(data))


def _cut(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def _zeros(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    start = draw.randrange(len(data))
    end = min(len(data), start + 4096)
    if not any(data[start:end]):
        data[start] = 1
    else:
        data[start:end] = bytes(end - start)
    file.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "one bit flipped": _flip,
    "cut off": _cut,
    "empty": lambda file, draw: file.write_bytes(b"") and None,
    "missing": lambda file, draw: file.unlink(),
    "a block of zeros": _zeros,
}


def damage(count: int, seed: int) -> list[dict]:
    """`count` stopped runs with a spoilt newest checkpoint; every fifth has no older one."""
    draw, pipeline, rows = random.Random(seed), narrow(), []
    whole = finished(lambda: run("distill", pipeline, None, False))["answer"]
    for number in range(count):
        sort, alone = list(DAMAGE)[number % len(DAMAGE)], number % 4 == 3
        folder = Path(tempfile.mkdtemp())

        def stopped(folder=folder):
            with draws_counted(stop_at=3 * SAVE_EVERY + 2):
                return run("distill", pipeline, folder, False)

        finished(stopped)
        found = checkpoints.checkpoints(folder)
        if alone:
            shutil.rmtree(found[0])
        file = draw.choice(sorted(f for f in found[-1].iterdir()))
        DAMAGE[sort](file, draw)
        end = finished(lambda folder=folder: run("distill", pipeline, folder, True))
        warned = any("Going on from" in w for w in end.get("warned", ()))
        named = found[-1].name in (end.get("error") or "")
        rows.append(
            {
                "damage": sort,
                "file": file.name,
                "older one": not alone,
                "outcome": "resumed, equal"
                if end.get("answer") == whole and warned
                else "refused by name"
                if alone and named and (end.get("error") or "").startswith("ValueError")
                else f"WRONG: {end}",
            }
        )
        shutil.rmtree(folder)
    return rows


# Fuzzing: each target takes a seed and gives "read", "refused", or raises what it should not.


def _mutated(data: bytes, draw: random.Random) -> bytes:
    mutated = bytearray(data)
    for _ in range(draw.randint(1, 12)):
        if not mutated:
            break
        place = draw.randrange(min(len(mutated), 300) if draw.random() < 0.6 else len(mutated))
        choice = draw.random()
        if choice < 0.6:
            mutated[place] = draw.randrange(256)
        elif choice < 0.8:
            del mutated[place : place + draw.randint(1, 40)]
        else:
            mutated[place:place] = draw.randbytes(draw.randint(1, 40))
    return bytes(mutated[: draw.randrange(len(mutated) + 1)] if draw.random() < 0.3 else mutated)


@functools.cache
def _images() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 24, 3), np.uint8)
    image, found = Image.fromarray(pixels), {}
    for name in FORMATS:
        for mode in ("RGB", "RGBA", "L", "P", "I;16", "CMYK"):
            buffer = io.BytesIO()
            with contextlib.suppress(KeyError, OSError, ValueError):
                made = Image.new(mode, (20, 16)) if mode == "I;16" else image.convert(mode)
                made.save(buffer, name)
                found[f"{name} {mode}"] = buffer.getvalue()
    return found


def fuzz_image(draw: random.Random, folder: Path) -> str:
    """A spoilt image file: an RGB image, or refused by its name."""
    kind = draw.choice(sorted(_images()))
    file = folder / "spoilt.img"
    file.write_bytes(_mutated(_images()[kind], draw))
    try:
        image = read_image(file, 16)
    except ValueError as error:
        assert "spoilt.img" in str(error), error
        return "refused"
    assert image.mode == "RGB" and min(image.size) >= 1
    return "read"


def fuzz_captions(draw: random.Random, folder: Path) -> str:
    """A spoilt list of captions: each image keeps its own, or the list is refused by name."""
    names = {"train/a/1.png": "first", "train/a/2.png": "second", "train/b/1.png": "third"}
    root = folder / "captioned"
    for name in names:
        if not (root / name).exists():
            picture(root / name)
    if draw.random() < 0.5:
        other, listing = root / "metadata.csv", root / "metadata.jsonl"
        rows = [json.dumps({"file_name": n, "text": t}) for n, t in names.items()]
    else:
        other, listing = root / "metadata.jsonl", root / "metadata.csv"
        rows = ["file_name,text", *(f"{n},{t}" for n, t in names.items())]
    other.unlink(missing_ok=True)
    if draw.random() < 0.5:  # whole rows, so that what comes out is known
        kept = [r for r in rows if draw.random() < 0.7 or r == "file_name,text"]
        draw.shuffle(kept[1:])
        listing.write_text("\n".join(kept))
        exact = True
    else:
        listing.write_bytes(_mutated("\n".join(rows).encode(), draw))
        exact = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = kdc.load_dataset(root, size=8)
        except ValueError as error:
            assert "metadata" in str(error), error
            return "refused"
    lines = listing.read_bytes().decode("utf-8", "replace").splitlines()
    for place, file in enumerate(dataset.files):
        name, said = file.relative_to(root).as_posix(), dataset.caption(place)
        if exact:
            assert said in (names[name], f"a photo of {file.parent.name}".replace(" of ", " of a ")
                            .replace("a a", "an a")), (name, said)  # fmt: skip
        else:
            # Another's caption is right only where the spoilt list does say so.
            says = any(file.stem in line and said in line for line in lines)
            assert says or said not in set(names.values()) - {names[name]}, (name, said)
    return "read"


def fuzz_checkpoint(draw: random.Random, folder: Path) -> str:
    """A spoilt checkpoint is never taken for a whole one."""
    source = folder / "checkpoints"
    if not source.exists():
        model = torch.nn.Linear(3, 3)

        def loss(model, generator):
            return {"loss": model(torch.randn(4, 3, generator=generator)).square().mean()}

        settings = TrainSettings(5, save_every=2, precision="no")
        with contextlib.redirect_stderr(io.StringIO()):
            kdc.training.loop.train(model, loss, settings, source)
    copied = folder / "copied"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(source, copied)
    (checkpoint,) = checkpoints.checkpoints(copied)
    file = draw.choice(sorted(checkpoint.iterdir()))
    before = file.read_bytes()
    file.write_bytes(_mutated(before, draw))
    same = file.read_bytes() == before
    same |= file.name == "manifest.json" and _same_manifest(before, file.read_bytes())
    try:
        found = checkpoints.newest_checkpoint(copied)
    except ValueError as error:
        assert checkpoint.name in str(error) and not same
        return "refused"
    assert found == checkpoint and same, file.name
    return "read"


def _same_manifest(before: bytes, after: bytes) -> bool:
    """Whether what a changed manifest says of the files is what it said before."""
    with contextlib.suppress(ValueError):
        now = json.loads(after)
        return json.loads(before)["files"].items() >= now.get("files", {"": ""}).items()
    return False


VALUES = (
    0, 1, -1, 2, 7, 0.5, 1.5, -0.1, 1e-4, 1e9, float("nan"), float("inf"), True, False, None, "",
    "a", "mini", "kdc", "cosine", "fifo", b"x", (), (0.9, 0.99), [1, 2], {}, {"a": 1}, 2**70,
)  # fmt: skip


def fuzz_arguments(draw: random.Random, folder: Path) -> str:
    """Any values for arguments: taken where they make sense, else `ValueError` or `TypeError`."""
    fields = [f.name for f in dataclasses.fields(TrainSettings)]
    targets: dict[str, tuple[Callable, list[str]]] = {
        "TrainSettings": (TrainSettings, fields),
        "LossWeights": (kdc.LossWeights, ["task", "output", "soft", "feature", "temperature"]),
        "ReplayBuffer": (kdc.ReplayBuffer, ["capacity", "policy", "dtype", "seed"]),
        "load_dataset": (kdc.load_dataset, ["name_or_folder", "split", "size", "count", "seed"]),
        "load_student": (kdc.load_student, ["source"]),
    }
    name = draw.choice(sorted(targets))
    function, names = targets[name]
    given = {n: draw.choice(VALUES) for n in names if draw.random() < 0.5}
    if name == "TrainSettings":
        given.setdefault("steps", 3)
    if name in ("load_dataset", "load_student"):
        first = "name_or_folder" if name == "load_dataset" else "source"
        given.setdefault(first, "mini" if name == "load_student" else "worlds")
    try:
        function(**given)
    except (ValueError, TypeError, FileNotFoundError) as error:
        assert str(error), "an error that says nothing"
        return "refused"
    return "read"


TARGETS: dict[str, Callable[[random.Random, Path], str]] = {
    "image files": fuzz_image,
    "lists of captions": fuzz_captions,
    "checkpoints": fuzz_checkpoint,
    "arguments": fuzz_arguments,
}


def fuzz(count: int, seed: int, seconds: float = 20) -> list[dict]:
    """`count` inputs for each target: how many were read, refused, and went wrong (and how)."""
    rows = []

    def late(number, frame):
        raise TimeoutError(f"longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    try:
        for name, target in TARGETS.items():
            outcomes: collections.Counter[str] = collections.Counter()
            wrong = []
            with tempfile.TemporaryDirectory() as folder:
                for number in range(count):
                    signal.setitimer(signal.ITIMER_REAL, seconds)
                    try:
                        draw = random.Random(f"{name} {seed} {number}")
                        outcomes[target(draw, Path(folder))] += 1
                    except Exception as error:
                        wrong.append(f"number {number}: {type(error).__name__}: {error}"[:300])
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
            rows.append({"target": name, "inputs": count, **outcomes, "wrong": wrong})
    finally:
        signal.signal(signal.SIGALRM, before)
    return rows


PARTS = {"kills": (kills, 50), "damage": (damage, 20), "fuzz": (fuzz, 5000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, help="trials; default: 50 kills, 20 damages, 5000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    function, count = PARTS[args.part]
    count = args.count or count
    started = time.perf_counter()
    rows = function(count, args.seed)
    spent = round(time.perf_counter() - started)
    ledger.write(f"robustness_{args.part}", {"rows": rows}, seed=args.seed, wall_seconds=spent)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
