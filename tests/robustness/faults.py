"""Every fault that was once found by trying, tried again: `python -m tests.robustness.faults`.

Each line does what went wrong and gives what happens now: the text of an error, or the right value.
Written to `results/faults.json`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import kdc
from kdc import pipelines
from kdc.continual.tasks import Task
from kdc.data.datasets import WorldDataset
from kdc.data.latents import latents_of_captions
from kdc.distillation.features import FeatureHooks
from kdc.replay.policies import herding_order
from kdc.training.checkpoints import checkpoints
from studies.common import ledger
from tests.helpers import calls_counted, captions_in, draws_counted, tree
from tests.robustness.trials import narrow

TRIALS: list[tuple[str, str, Callable[[Path], object]]] = []
ROSE = "a red rose on a night background"


def trial(kind: str, what: str):
    """One line: what is done, and a function of an empty folder that does it."""

    def add(function):
        TRIALS.append((kind, what, function))
        return function

    return add


class Setup:
    """Networks and data that the trials share."""

    def __init__(self):
        self.teacher = kdc.load_teacher("mini", device="cpu")
        self.small = narrow()
        self.data = kdc.cache_latents(self.teacher, WorldDataset(["flora"], count=8))

    def student(self):
        return kdc.slim(self.small.unet, "kdc")

    def distill(self, folder, student=None, data=None, **settings):
        how = {"steps": 4, "batch_size": 2, "save_every": 2, "output_dir": folder} | settings
        student = student or self.student()
        return kdc.distill(student, self.small, data or self.data, **how)


def early(folder, **settings) -> str:
    """The error of a run on images, and that none of them was encoded before."""
    with calls_counted((S.small.vae, "encode")) as calls:
        try:
            S.distill(folder, data=WorldDataset(["flora"], count=4), **settings)
        except Exception as error:
            return f"{type(error).__name__}: {error} [{len(calls)} images encoded before]"
    return "accepted"


# 1. Finished work is lost, or other people's files are.


@trial("1", 'distill(output_dir="~/x")')
def _(folder):
    before = os.environ["HOME"], os.getcwd()
    os.environ["HOME"] = str(folder)
    os.chdir(folder)
    try:
        S.distill("~/x")
        kdc.load_student("~/x", S.small)
    finally:
        os.environ["HOME"] = before[0]
        os.chdir(before[1])
    return f"in the home folder: {sorted(p.name for p in folder.iterdir())}"


@trial("1", "output_dir is a file")
def _(folder):
    (folder / "file").write_text("x")
    return early(folder / "file")


@trial("1", "output_dir cannot be written")
def _(folder):
    return early("/proc/nowhere")


@trial("1", "a user's checkpoint-0000001-notes/ and checkpoint-0.txt beside a run")
def _(folder):
    (folder / "checkpoint-0000001-notes").mkdir()
    (folder / "checkpoint-0.txt").write_text("x")
    S.distill(folder)
    return f"there are {sorted(p.name for p in folder.glob('checkpoint-*'))}"


@trial("1", "distill as README shows it (steps=200, nothing said of saving), killed half-way")
def _(folder):
    how = {"steps": 200, "save_every": None, "resume": True}
    with draws_counted(stop_at=101), contextlib.suppress(KeyboardInterrupt):
        S.distill(folder, **how)
    left = [p.name for p in checkpoints(folder)]
    with draws_counted() as draws:
        S.distill(folder, **how)
    return f"left {left}; went on for the last {len(draws)} steps"


@trial("1", "a second run into a finished folder")
def _(folder):
    S.distill(folder)
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    return early(folder)


@trial("1", "checkpoints beside a finished student")
def _(folder):
    S.distill(folder)
    kept = [p.name for p in checkpoints(folder)]
    S.distill(folder / "b", keep_state=False)
    return f"{kept}; with keep_state=False {[p.name for p in checkpoints(folder / 'b')]}"


@trial("1", "a replay buffer on a full disk")
def _(folder):
    original = os.posix_fallocate
    os.posix_fallocate = lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    try:
        kdc.ReplayBuffer(500, folder=folder).add(S.data)
    finally:
        os.posix_fallocate = original


# 2. Damage is not noticed, or not survived.


@trial("2", "the newest checkpoint has one flipped bit")
def _(folder):
    return _fall_back(folder, lambda c: _flip(c / "model.safetensors"))


@trial("2", "... an empty state.json")
def _(folder):
    return _fall_back(folder, lambda c: (c / "state.json").write_bytes(b""))


@trial("2", "... is cut off")
def _(folder):
    file = "optimizer.safetensors"
    return _fall_back(folder, lambda c: (c / file).write_bytes((c / file).read_bytes()[:99]))


@trial("2", "... an empty folder of that name")
def _(folder):
    return _fall_back(folder, lambda c: [f.unlink() for f in c.iterdir()])


def _flip(file: Path):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def _fall_back(folder, spoil) -> str:
    whole = S.student()
    S.distill(folder / "whole", whole, steps=6)
    with draws_counted(stop_at=6), contextlib.suppress(KeyboardInterrupt):
        S.distill(folder / "run", steps=6)
    spoil(checkpoints(folder / "run")[-1])
    resumed = S.student()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        S.distill(folder / "run", resumed, steps=6, resume=True)
    said = [str(w.message) for w in caught if "Going on from" in str(w.message)]
    equal = all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    return f"equal weights: {equal}; {said[0]}"


@trial("2", "resume with a part frozen, then all trainable")
def _(folder):
    student = S.student()
    student.conv_in.requires_grad_(False)
    S.distill(folder, student)
    S.distill(folder, steps=6, resume=True)


@trial("2", "resume with another std, another empty caption, a teacher of velocities")
def _(folder):
    import dataclasses

    S.distill(folder)
    said = []
    for change in ("std", "empty"):
        data = dataclasses.replace(S.data, **{change: getattr(S.data, change) + 1})
        said.append(_error(lambda data=data: S.distill(folder, data=data, resume=True)))
    S.small.scheduler.register_to_config(prediction_type="v_prediction")
    try:
        said.append(_error(lambda: S.distill(folder, resume=True)))
    finally:
        S.small.scheduler.register_to_config(prediction_type="epsilon")
    return " | ".join(said)


@trial("2", "resume with more steps and another save_every")
def _(folder):
    S.distill(folder)
    log = S.distill(folder, steps=8, save_every=3, resume=True)
    return f"goes on to step {log['step'].iloc[-1]}"


@trial("2", "a text encoder's file without a tensor")
def _(folder):
    shutil.copytree(pipelines.MINI_TEACHER, folder / "t")
    (file,) = (folder / "t" / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file, {"format": "pt"})
    kdc.load_teacher(folder / "t")


@trial("2", "a student's folder with only a .bin")
def _(folder):
    shutil.copytree(pipelines.MINI_STUDENT, folder / "s")
    (file,) = (folder / "s" / "unet").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    kdc.load_student(folder / "s")


@trial("2", "a kdc.json whose plan is not the network's")
def _(folder):
    kdc.save_student(S.student(), folder)
    note = json.loads((folder / "kdc.json").read_text())
    note["plan"] = kdc.PLANS["bk-base"].to_dict()
    (folder / "kdc.json").write_text(json.dumps(note))
    kdc.load_student(folder, S.small)


@trial("2", "a teacher's folder with only *.fp16.safetensors")
def _(folder):
    shutil.copytree(pipelines.MINI_TEACHER, folder / "t")
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / "t" / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    return f"loaded, {kdc.load_teacher(folder / 't').unet.dtype}"


# 3. Not-a-number, or no information, becomes a result.


def _poisoned(part):
    pipeline = kdc.load_teacher("mini", device="cpu")
    next(iter(getattr(pipeline, part).parameters())).data[:] = float("nan")
    return pipeline


@trial("3", "evaluate with NaN in the U-Net")
def _(folder):
    kdc.evaluate(_poisoned("unet"), [ROSE], steps=1, seeds=(0,))


@trial("3", "cache_latents with NaN in the encoder")
def _(folder):
    kdc.cache_latents(_poisoned("vae"), WorldDataset(["flora"], count=2))


@trial("3", "learning_rate=inf")
def _(folder):
    return early(folder, learning_rate=float("inf"))


@trial("3", "weights that become NaN in the last step")
def _(folder):
    from kdc.training.loop import train
    from kdc.training.settings import TrainSettings

    model = torch.nn.Linear(2, 1)

    def poison():
        model.weight.grad[:] = float("nan")

    def loss(m, g):
        return {"loss": m(torch.randn(4, 2, generator=g)).square().mean()}

    train(model, loss, TrainSettings(1), before_step=poison)


@trial("3", "evaluate with seeds (0, 0)")
def _(folder):
    kdc.evaluate(S.teacher, [ROSE], seeds=(0, 0), steps=1)


@trial("3", "a reference of 12 images")
def _(folder):
    real = torch.randint(0, 255, (12, 3, 64, 64), dtype=torch.uint8)
    table = kdc.evaluate(S.teacher, [ROSE] * 6, real, seeds=(0,), steps=1).table
    kid = table.loc["kid", "value"]
    return f"fd: {table.loc['fd', 'value']} ({table.loc['fd', 'note']}); kid: {kid:.3f}"


# 4. Randomness that no seed governs.


@trial("4", "samplers that draw noise, one seed, two calls and two batch sizes")
def _(folder):
    worst, names = 0, []
    for cls in (
        diffusers.EulerAncestralDiscreteScheduler,
        diffusers.KDPM2AncestralDiscreteScheduler,
        diffusers.DDPMScheduler,
        diffusers.LCMScheduler,
    ):
        pipeline = pipelines.with_unet(S.teacher, S.teacher.unet)
        pipeline.scheduler = cls.from_config(S.teacher.scheduler.config)
        images = [
            kdc.generate(pipeline, [ROSE, "a blue tulip on a sky background"], steps=4, seed=3,
                         batch_size=size, progress=False)
            for size in (2, 2, 1)
        ]  # fmt: skip
        assert torch.equal(*images[:2])
        worst = max(worst, (images[0].int() - images[2].int()).abs().max().item())
        names.append(cls.__name__)
    return f"equal between calls, at most {worst} levels between batch sizes ({len(names)} tried)"


@trial("4", "cache_latents and evaluate move the global generator")
def _(folder):
    before = torch.get_rng_state()
    kdc.cache_latents(S.teacher, WorldDataset(["flora"], count=2))
    kdc.evaluate(S.teacher, [ROSE], seeds=(0,), steps=1)
    return f"it stays: {torch.equal(before, torch.get_rng_state())}"


# 5. A string is a sequence too.


@trial("5", 'evaluate(p, "a red rose"), Task(prompts=str), latents_of_captions(str)')
def _(folder):
    scores = kdc.evaluate(S.teacher, ROSE, seeds=(0,), steps=1)
    task = Task("t", S.data, prompts=ROSE)
    made = latents_of_captions(S.teacher, ROSE, steps=1)
    return f"prompts: {scores.images.shape[1]}, {len(task.prompts)}, {len(made)}"


# 6. Which files are data, and what they say.


@trial("6", ".ipynb_checkpoints/, __MACOSX/, .cache/, .Trash-1/ beside a class")
def _(folder):
    rubbish = (".ipynb_checkpoints", "__MACOSX", ".cache", ".Trash-1")
    return captions_in(tree(folder, "train/rose/1.png", *(f"train/{r}/1.png" for r in rubbish)))


@trial("6", "a class folder that is a link")
def _(folder):
    tree(folder / "far", "tulip/1.png")
    tree(folder / "near", "train/rose/1.png")
    (folder / "near" / "train" / "tulip").symlink_to(folder / "far" / "tulip")
    return captions_in(folder / "near")


@trial("6", "a class folder that may not be read")
def _(folder):
    tree(folder, "train/rose/1.png", "train/secret/1.png")
    original = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    os.scandir = refuse
    try:
        return captions_in(folder)
    finally:
        os.scandir = original


@trial("6", "Train/ and Test/; training/ and testing/; TRAIN/ and VAL/")
def _(folder):
    found = []
    for number, (a, b) in enumerate((("Train", "Test"), ("training", "testing"), ("TRAIN", "VAL"))):
        root = tree(folder / str(number), f"{a}/x/1.png", f"{a}/x/2.png", f"{b}/x/3.png")
        found.append((len(captions_in(root)), len(captions_in(root, "test"))))
    return f"train and test images: {found}"


@trial("6", "classes named train, bus, car")
def _(folder):
    captions_in(tree(folder, "train/1.png", "bus/2.png", "car/3.png"))


@trial("6", "metadata.csv; .txt beside images; several captions an image")
def _(folder):
    tree(folder / "a", "train/x/1.png")
    (folder / "a" / "metadata.csv").write_text("file_name,text\ntrain/x/1.png,mine\n")
    tree(folder / "b", "train/x/1.png")
    (folder / "b" / "train" / "x" / "1.txt").write_text("one\ntwo\n")
    several = kdc.load_dataset(folder / "b", size=8)[0]["captions"]
    return f"{captions_in(folder / 'a')}, {several}"


@trial("6", "rows with a prefix, backslash, other suffix, case, Unicode form, a blank line")
def _(folder):
    names = ["rose/1.png", "rose/2.png", "rose/3.png", "rose/4.png", "rose/grün.png"]
    tree(folder, *(f"train/{unicodedata.normalize('NFD', n)}" for n in names))
    written = ["data/train/rose/1.png", "train\\rose\\2.png", "rose/3.jpeg", "TRAIN/Rose/4.PNG",
               "train/rose/grün.png"]  # fmt: skip
    rows = [json.dumps({"file_name": n, "text": f"caption {i}"}) for i, n in enumerate(written)]
    (folder / "metadata.jsonl").write_text("\n\n".join(rows))
    return f"{sorted(captions_in(folder).values())}"


@trial("6", "a row without an image and an image without a row")
def _(folder):
    tree(folder, "train/rose/1.png", "train/rose/2.png")
    row = '{"file_name": "train/rose/%d.png", "text": "x"}'
    (folder / "metadata.jsonl").write_text("\n".join((row % 1, row % 9)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        captions_in(folder)
    return f"warns: {caught[0].message}"


@trial("6", "a 16-bit image; a transparent one; a broken EXIF block")
def _(folder):
    from kdc.data.images import read_image, unreadable

    Image.fromarray(np.full((9, 9), 128 * 257, np.uint16)).save(folder / "deep.png")
    Image.new("RGBA", (9, 9), (200, 0, 0, 0)).save(folder / "clear.png")
    Image.new("RGB", (9, 9)).save(folder / "exif.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    grey, clear = (read_image(folder / n).getpixel((4, 4)) for n in ("deep.png", "clear.png"))
    bad = unreadable([folder / "exif.jpg"], 8)
    return f"grey {grey}, transparent {clear}, broken EXIF refused: {bool(bad)}"


@trial("6", "a text file among four images")
def _(folder):
    tree(folder, "a.png", "b.png", "c.png", "d.png")
    (folder / "z.txt").write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f"train {len(captions_in(folder))}, test {len(captions_in(folder, 'test'))} images"


@trial("6", "the same image in train and test")
def _(folder):
    tree(folder, "train/x/1.png", "test/x/2.png")
    shutil.copy(folder / "train/x/1.png", folder / "test/x/copy.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        captions_in(folder)
    return f"warns: {caught[0].message}"


@trial("6", "12-megapixel photographs, looked at twice; a limit on images")
def _(folder):
    pixels = np.random.default_rng(0).integers(0, 255, (75, 100, 3), np.uint8)
    image = Image.fromarray(pixels).resize((4000, 3000))
    for number in range(12):
        (folder / "train" / "x").mkdir(parents=True, exist_ok=True)
        image.save(folder / "train" / "x" / f"{number}.jpg", quality=90, comment=b"%d" % number)
    started = time.perf_counter()
    for file in sorted(folder.rglob("*.jpg")):
        with Image.open(file) as opened:
            opened.load()
    whole = time.perf_counter() - started
    times = []
    for _ in range(2):
        started = time.perf_counter()
        kdc.load_dataset(folder, size=64)
        times.append(time.perf_counter() - started)
    few = len(kdc.load_dataset(folder, size=64, count=5))
    return (
        f"a first look takes {times[0] / whole:.2f} of decoding them whole, a second "
        f"{times[1] / whole:.3f}; count=5 gives {few}"
    )


# 7. State that outlives an interruption.


@trial("7", "Ctrl-C in bf16")
def _(folder):
    student = S.student()
    with draws_counted(stop_at=2), contextlib.suppress(KeyboardInterrupt):
        kdc.distill(student, S.small, S.data, steps=3, batch_size=2, precision="bf16")
    inputs = S.data.mean[:1], torch.tensor([5]), S.data.embeddings[:1]
    with torch.no_grad():
        bare = torch.equal(student(*inputs).sample, type(student).forward(student, *inputs).sample)
    return f"training mode: {student.training}, computes as without the wrapper: {bare}"


@trial("7", "the user's progress bar after generate")
def _(folder):
    pipeline = pipelines.with_unet(S.teacher, S.teacher.unet)
    pipeline.set_progress_bar_config(desc="mine")
    kdc.generate(pipeline, ROSE, steps=1)
    return f"{pipeline._progress_bar_config}"


@trial("7", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4")
def _(folder):
    first = S.distill(None, steps=2)
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "4"
    try:
        second = S.distill(None, steps=2)
    finally:
        del os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"]
    return f"the same gradient: {first['grad_norm'].equals(second['grad_norm'])}"


@trial("7", "adapters in a teacher, and in a student")
def _(folder):
    student = S.student()
    student.conv_in.lora_A = torch.nn.Linear(2, 2)
    return " | ".join(_error(f) for f in (lambda: kdc.slim(student, "kdc"),
                                          lambda: kdc.save_student(student, folder)))  # fmt: skip


# 8. Said late, or deep inside.

for _what, _how in {
    "a forgotten resume": {},
    "another seed": {"resume": True, "seed": 3},
    "steps=2.5": {"steps": 2.5},
    "save_every=0": {"save_every": 0},
    "learning_rate=nan": {"learning_rate": float("nan")},
}.items():

    @trial("8", _what)
    def _(folder, how=_how):
        S.distill(folder)
        return early(folder, **how)


@trial("8", "a frozen student")
def _(folder):
    return early(folder, student=S.student().requires_grad_(False))


@trial("8", "a 9-channel, and an SDXL-like, teacher")
def _(folder):
    import copy

    said = []
    for change in ({"in_channels": 9}, {"addition_embed_type": "text_time"}):
        unet = copy.copy(S.small.unet)
        unet._internal_dict = type(unet.config)(dict(unet.config) | change)
        teacher = pipelines.with_unet(S.small, unet)
        said.append(_error(lambda t=teacher: kdc.distill(S.student(), t, None, steps=1)))
    return " | ".join(said)


@trial("8", "chapter 04 on a flat folder, on unique captions, on twice the same name")
def _(folder):
    from studies.replay.tasks import check_dataset

    tree(folder / "flat", *(f"{i}.png" for i in range(9)))
    tree(folder / "unique", *(f"train/{i}/1.png" for i in range(4)), "test/0/9.png")
    tree(folder / "b" / "flat", "1.png", "2.png")
    given = (folder / "flat", folder / "unique", f"{folder / 'flat'} then {folder / 'b' / 'flat'}")
    return " | ".join(_error(lambda one=one: check_dataset(one)) for one in given)


@trial("8", "generate(steps=0); batch_size=0; an empty reference; load_dataset(''); dataset 102")
def _(folder):
    empty = torch.zeros(0, 3, 64, 64, dtype=torch.uint8)
    return " | ".join(
        _error(f)
        for f in (
            lambda: kdc.generate(S.teacher, ROSE, steps=0),
            lambda: kdc.generate(S.teacher, ROSE, batch_size=0),
            lambda: kdc.evaluate(S.teacher, ROSE, empty, steps=1),
            lambda: kdc.load_dataset(""),
            lambda: kdc.load_dataset(102),  # type: ignore[arg-type]
        )
    )


@trial("8", "a damaged kdc.json and sequence.json; a plan that is a dictionary")
def _(folder):
    from kdc.continual.records import read_notes

    kdc.save_student(S.student(), folder / "s")
    (folder / "s" / "kdc.json").write_text("{")
    (folder / "sequence.json").write_text("[]")
    return " | ".join(
        _error(f)
        for f in (
            lambda: kdc.load_student(folder / "s", S.small),
            lambda: read_notes(folder),
            lambda: kdc.slim(S.small.unet, {"name": "x"}),  # type: ignore[arg-type]
        )
    )


@trial("8", 'features at "attention" with plan kdc-v2')
def _(folder):
    student = kdc.slim(S.teacher.unet, "kdc-v2")
    pairs = kdc.tap_names(student, S.teacher.unet, "attention")
    shapes = []
    for unet, names in zip((student, S.teacher.unet), zip(*pairs, strict=True), strict=True):
        hooks = FeatureHooks(unet, names)
        with torch.no_grad():
            unet(S.data.mean[:1], torch.tensor([5]), S.data.embeddings[:1])
        shapes.append([tuple(x.shape) for x in hooks.take()])
        hooks.close()
    return f"{len(pairs)} pairs, of equal sizes: {shapes[0] == shapes[1]}"


# 9. Several processes.


@trial("9", "bare torchrun on CPUs, two processes, features alone")
def _(folder):
    code = (
        "import torch, sys, kdc\n"
        "from kdc.data.datasets import WorldDataset\n"
        "from kdc.processes import this_process\n"
        "teacher = kdc.load_teacher('mini')\n"
        "data = kdc.cache_latents(teacher, WorldDataset(['flora'], count=4))\n"
        "student = kdc.slim(teacher.unet, 'kdc')\n"
        "log = kdc.distill(student, teacher, data, steps=2, batch_size=1, output_dir=sys.argv[1],\n"
        "                  weights=kdc.LossWeights.only('feature'))\n"
        "total = sum(p.double().sum().item() for p in student.parameters())\n"
        "print('SEEN', this_process().num_processes, total, log['images'].iloc[-1], flush=True)\n"
    )
    (folder / "run.py").write_text(code)
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend",
         "c10d", "--rdzv_endpoint", "localhost:0", "run.py", "out"],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seen = {line.partition("SEEN ")[2] for line in done.stdout.splitlines() if "SEEN" in line}
    return f"processes, weights and images as each of them sees it: {sorted(seen)}"


@trial("9", "two runs into one folder")
def _(folder):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom kdc.processes import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        other.stdout.readline()
        return early(folder)
    finally:
        other.kill()
        other.wait()


# 10. Grows with the data.


@trial("10", "herding of 4,000 items of one class")
def _(folder):
    features = torch.randn(4000, 1024, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    herding_order(features, 4000)
    return f"{time.perf_counter() - started:.2f} s"


@trial("10", "python -m kdc --help")
def _(folder):
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kdc", "--help"], capture_output=True, check=True)
    return f"{time.perf_counter() - started:.2f} s"


# 11. The book and its tools.


@trial("11", "python -m studies with a wrong stage, and book.py with a wrong parameter")
def _(folder):
    said = []
    for command in (["-m", "studies", "distillation", "recipe"],
                    ["tools/book.py", "run", "--only", "A3", "-p", "bugdet", "quick"],
                    ["tools/book.py", "run", "--only", "A3", "-p", "dataset", "102"]):  # fmt: skip
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=ledger.RESULTS.parent
        )
        said.append(done.stderr.strip().splitlines()[-1])
    return " | ".join(said)


def _error(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


S: Setup


def main() -> None:
    global S
    torch.set_num_threads(1)
    S = Setup()
    home, rows = str(Path.home()), []
    for kind, what, function in TRIALS:
        with tempfile.TemporaryDirectory() as folder:
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                try:
                    outcome = str(function(Path(folder)))
                except Exception as error:
                    outcome = f"{type(error).__name__}: {error}"
            outcome = " ".join(outcome.replace(folder, "FOLDER").replace(home, "~").split())
        rows.append({"kind": kind, "tried": what, "outcome": outcome[:400]})
        print(f"| {kind} | {what} | {outcome[:400].replace('|', '/')} |", flush=True)
    ledger.write("faults", {"rows": rows})


if __name__ == "__main__":
    main()
