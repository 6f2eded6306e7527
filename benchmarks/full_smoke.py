"""The whole way at full size, on a CPU: `python -m benchmarks.full_smoke`, or `make full-smoke`.

A Stable Diffusion 1.x pipeline with random weights goes to the disk in half precision; then, by the
public functions alone: load it, encode photographs of 512 x 512 into a cache on disk, cut a student
of 482,346,884 parameters, distil it for two steps, learn two tasks by replay for a step each,
generate an image, export the student, and open it in a process that has diffusers alone. Nothing
is learnt by it; it shows that every part works at this size, and what it takes. Written is
`results/full_smoke.json`: seconds and peak memory of each part. `--tiny` does the same with the
mini teacher.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import kdc
from benchmarks.setups import sd_pipeline
from kdc.continual.tasks import Task
from kdc.data.cache import cache_latents
from kdc.pipelines import write_pipeline
from kdc.unet.slimming import count_parameters
from studies.common import ledger

PARAMETERS = 482_346_884  # of the paper's student
GOAL = {"minutes": 15, "peak_gib": 20}
REOPEN = """
import sys, torch
sys.modules["kdc"] = None
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
unet = pipeline.unet
side, width = unet.config.sample_size, unet.config.cross_attention_dim
with torch.no_grad():
    out = unet(torch.zeros(1, 4, side, side), 500, torch.zeros(1, 77, width)).sample
assert out.isfinite().all()
print(sum(p.numel() for p in unet.parameters()))
"""


class Parts:
    """Seconds of each part, and the memory's peak so far."""

    def __init__(self):
        self.rows: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        gc.collect()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.rows[name] = {"seconds": time.perf_counter() - started, "peak_gib_so_far": peak}
        print(f"{name}: {self.rows[name]['seconds']:.1f} s, peak {peak:.1f} GiB", flush=True)


def photographs(root: Path, classes: tuple[str, ...], each: int) -> Path:
    """Synthetic JPEGs of 640 x 560 in class folders below train/ and test/."""
    draw = np.random.default_rng(0)
    for split, count in (("train", each), ("test", 1)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                coarse = Image.fromarray(draw.integers(0, 255, (7, 8, 3), np.uint8))
                coarse.resize((640, 560)).save(root / split / name / f"{number}.jpg")
    return root


def run(folder: Path, tiny: bool, parts: Parts) -> int:
    """All parts but the last, in a folder that is empty; the number of the student's parameters."""
    with parts.part("write a pipeline with random weights"):
        whole = kdc.load_teacher("mini", device="cpu") if tiny else sd_pipeline(torch.device("cpu"))
        write_pipeline(whole, folder / "teacher", torch.float16)
        del whole
    with parts.part("load it"):
        teacher = kdc.load_teacher(folder / "teacher", device="cpu")
    size = teacher.unet.config.sample_size * teacher.vae_scale_factor
    classes = ("rose", "iris"), ("moth", "atlas")
    homes = [photographs(folder / "-".join(names), names, 1) for names in classes]
    with parts.part("encode photographs into a cache on disk"):
        train, test = (
            [
                cache_latents(
                    teacher, kdc.load_dataset(home, split, size), 1, folder=folder / "latents"
                )
                for home in homes
            ]
            for split in ("train", "test")
        )
    with parts.part("cut the student"):
        student = kdc.slim(teacher.unet, "kdc")
        found = count_parameters(student)
        if not tiny and found != PARAMETERS:
            raise AssertionError(f"the student has {found:,} parameters, not {PARAMETERS:,}")
    common = {"batch_size": 1, "learning_rate": 1e-6, "ema_decay": 0.0, "keep_state": False}
    common |= {"gradient_checkpointing": True}
    with parts.part("distil two steps, all four terms"):
        log = kdc.distill(
            student, teacher, train[0], steps=2, output_dir=folder / "student", **common
        )
        assert len(log) and log["loss"].notna().all()
    with parts.part("two tasks by replay, a step each, scored"):
        tasks = [
            Task(home.name, data, test=held_out)
            for home, data, held_out in zip(homes, train, test, strict=True)
        ]

        result = kdc.run_sequence(
            tasks,
            "replay",
            student,
            teacher,
            evaluate=functools.partial(_error, teacher),
            higher_is_better={"output_error": False},
            ahead=False,
            buffer=kdc.ReplayBuffer(2),
            weights=kdc.LossWeights.only("task"),
            steps=1,
            output_dir=folder / "sequence",
            **common,
        )
        assert np.isfinite(result.matrix.values[1]).all()
    with parts.part("generate an image in two steps"):
        images = kdc.generate(kdc.with_unet(teacher, student), ["a rose"], steps=2, progress=False)
        assert images.shape == (1, 3, size, size)
    with parts.part("export the student"):
        kdc.export(student, teacher, folder / "handed over", half=True)
    return found


def _error(teacher, pipeline, task: Task) -> dict[str, float]:
    """The score of the two tasks: one image at one level of noise."""
    error = kdc.output_error(pipeline.unet, teacher, task.test, count=1, levels=1)
    return {"output_error": float(error.mean())}


def reopen(folder: Path, found: int, parts: Parts) -> None:
    """Open what was handed over in a process where kdc cannot be imported."""
    with parts.part("open it with diffusers alone"):
        code = [sys.executable, "-c", REOPEN, str(folder / "handed over")]
        opened = subprocess.run(code, capture_output=True, text=True, check=True).stdout
        if int(opened) != found:
            raise AssertionError(f"diffusers finds {opened.strip()} parameters, not {found}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the mini teacher, in seconds")
    parser.add_argument("--results", help="where to write (default: results/)")
    args = parser.parse_args(argv)
    parts, started = Parts(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), args.tiny, parts)
        gc.collect()
        reopen(Path(folder), found, parts)
    minutes = (time.perf_counter() - started) / 60
    peak = max(row["peak_gib_so_far"] for row in parts.rows.values())
    values = {"parts": parts.rows, "minutes": minutes, "peak_gib": peak, "goal": GOAL}
    values["met"] = minutes <= GOAL["minutes"] and peak <= GOAL["peak_gib"]
    name = "full_smoke_tiny" if args.tiny else "full_smoke"
    path = ledger.write(name, values, args.results)
    print(f"{minutes:.1f} minutes, peak {peak:.1f} GiB; written to {path}")


if __name__ == "__main__":
    main()
