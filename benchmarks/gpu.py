"""What one GPU does with this project, in minutes: `python -m benchmarks.gpu`, or `make gpu`.

Each part runs in a process of its own and stands alone: `python -m benchmarks.gpu latency`. A part
that fails or is not through when its time is up ends, and the next one begins; what it had
measured until then stays. Written are `results/gpu_<part>_cuda.json`, each with the device's name.
Nothing is fetched: networks of full size have random weights, which are as fast as trained ones.

`--tiny --device cpu` runs every part on a CPU with the mini networks, as the tests do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import kdc
from benchmarks import setups
from benchmarks.distill_step import as_ratios, race
from benchmarks.setups import sd_pipeline
from kdc.continual.tasks import Task
from kdc.data.latents import LatentDataset
from kdc.evaluation.latency import time_images
from kdc.pipelines import with_unet
from kdc.training.efficiency import compile_unet
from kdc.training.logs import peak_memory
from kdc.unet.plans import PLANS
from studies.common import ledger
from studies.slimming.full_size import borrow, time_plans
from tools import book

Rows = Iterator[dict]


@dataclass(frozen=True)
class Place:
    """Where a part runs."""

    # The device, and whether with the mini networks.
    device: torch.device
    tiny: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def pipeline(self, dtype: torch.dtype | None = None):
        """A teacher with random weights, or the mini one."""
        if self.tiny:
            return kdc.load_teacher("mini", dtype or torch.float32, self.device)
        return sd_pipeline(self.device).to(dtype or torch.float32)

    def latents(self, pipeline, count: int = 64) -> LatentDataset:
        """Random latents with random embeddings, as large as the pipeline's."""
        unet, g = pipeline.unet.config, torch.Generator().manual_seed(0)
        shape = count, unet.in_channels, unet.sample_size, unet.sample_size
        length, width = pipeline.tokenizer.model_max_length, unet.cross_attention_dim
        return LatentDataset(
            torch.randn(shape, generator=g), torch.rand(shape, generator=g) * 0.1,
            torch.randn(4, length, width, generator=g), torch.arange(count) % 4,
            torch.zeros(length, width), ["a", "b", "c", "d"],
        )  # fmt: skip


def latency(place: Place) -> Rows:
    """A call of every plan, side by side, at batch 1 and 8, as it is and compiled by regions."""
    unet = place.pipeline(place.dtype).unet.requires_grad_(False)
    rounds = 2 if place.tiny else 20
    for compiled in (False, True):
        for batch_size in (1, 8):
            started, prepare = time.perf_counter(), compile_unet if compiled else None
            times = time_plans(unet, PLANS, rounds, prepare, batch_size=batch_size)
            for name, row in times.iterrows():
                shown = {"plan": name, "batch_size": batch_size, "compiled": compiled}
                yield shown | row.to_dict() | {"part_seconds": time.perf_counter() - started}


def throughput(place: Place) -> Rows:
    """Images a second and memory of `kdc.distill`, in the precision it chooses."""
    pipeline = place.pipeline()
    data = place.latents(pipeline)
    settings = [(8, False), (32, False), (32, True), (64, False)]
    for batch_size, recomputed in [(2, False), (2, True)] if place.tiny else settings:
        student = kdc.slim(pipeline.unet, "kdc")
        shown = {"batch_size": batch_size, "gradient_checkpointing": recomputed}
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(place.device)
        marks: list[float] = []

        class Timed(LatentDataset):
            def draw(self, *args, marks=marks, **kwargs):
                if place.device.type == "cuda":
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())
                return super().draw(*args, **kwargs)

        steps = 4 if place.tiny else 14
        try:
            kdc.distill(
                student, pipeline, Timed(**vars(data)), steps=steps, batch_size=batch_size,
                learning_rate=1e-9, ema_decay=0.0, gradient_checkpointing=recomputed,
                log_every=steps,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            yield shown | {"error": str(error).split(". ")[0]}
            continue
        steady = marks[3:]  # the first steps warm up
        rate = (
            batch_size * (len(steady) - 1) / (steady[-1] - steady[0]) if len(steady) > 1 else None
        )
        yield shown | {"images_per_second": rate, "peak_gib": peak_memory(place.device)}


def step(place: Place) -> Rows:
    """A distillation step beside the plain loop's: in float32, as it chooses, and compiled so."""
    setup = (setups.mini if place.tiny else setups.full)(place.device)
    batch_size, rounds = (2, 2) if place.tiny else (8, 6)
    for name in ("ours", "chosen") if place.tiny else ("ours", "chosen", "chosen, compiled"):
        times, _ = race(["reference", name], setup, place.device, batch_size, rounds)
        for contender, row in as_ratios(times, batch_size).items():
            yield {"contender": contender, "beside": name, "batch_size": batch_size} | row


def pipelines(place: Place) -> Rows:
    """Text to image, end to end: the teacher at 50 steps, a student of each plan at 50, 25, 16."""
    teacher = place.pipeline(place.dtype)
    students = {
        name: with_unet(teacher, borrow(teacher.unet, plan))
        for name, plan in PLANS.items()
        if name != "full"
    }
    rounds, batches = (1, (1,)) if place.tiny else (3, (1, 4))
    for steps in (2,) if place.tiny else (50, 25, 16):
        chosen = {"teacher": teacher} | students if steps in (2, 50) else students
        times = time_images(chosen, "a red rose", steps=[steps], batch_sizes=batches, rounds=rounds)
        yield from times.to_dict("records")


def replay(place: Place) -> Rows:
    """One sequence of two tasks by replay."""
    pipeline = place.pipeline()
    student = kdc.slim(pipeline.unet, "kdc")
    tasks = [Task(f"task {t}", place.latents(pipeline)) for t in range(2)]
    steps, batch_size = (1, 2) if place.tiny else (10, 8)
    result = kdc.run_sequence(
        tasks, "replay", student, pipeline, buffer=kdc.ReplayBuffer(16), steps=steps,
        batch_size=batch_size, learning_rate=1e-9, ema_decay=0.0, ahead=False,
        evaluate=lambda scored, task: {"none": 0.0}, higher_is_better={"none": True},
    )  # fmt: skip
    for name, row in result.counts.iterrows():
        shown = {"task": name, "steps": steps, "batch_size": batch_size}
        yield shown | row.to_dict() | {"peak_gib": peak_memory(place.device)}


def chapters(place: Place) -> Rows:
    """Every chapter at the quick budget, on the device that it finds."""
    for notebook in book.notebooks()[: 1 if place.tiny else None]:
        started = time.perf_counter()
        try:
            book.run_one(notebook)
            said = "ran"
        except Exception as error:  # whatever a cell raised; the others go on
            said = f"{type(error).__name__}: {str(error).splitlines()[-1]}"
        yield {"chapter": notebook.stem, "seconds": time.perf_counter() - started, "result": said}


@dataclass(frozen=True)
class Part:
    """One entry of `PARTS`."""

    # Yields rows as they are measured.
    measure: Callable[[Place], Rows]
    # Seconds after which it is ended.
    seconds: int


PARTS = {
    "throughput": Part(throughput, 90),
    "step": Part(step, 60),
    "latency": Part(latency, 90),
    "pipelines": Part(pipelines, 80),
    "replay": Part(replay, 40),
    "chapters": Part(chapters, 120),
}


def run_part(name: str, place: Place, results: str | None) -> Path:
    """Measure one part here; what is measured is written after each row."""
    rows: list[dict] = []
    file = f"gpu_{name}_{place.device.type}"
    for row in PARTS[name].measure(place):
        rows.append(row)
        ledger.write(file, {"rows": rows, "whole": False}, results, tiny=place.tiny)
        print(row, flush=True)
    return ledger.write(file, {"rows": rows, "whole": True}, results, tiny=place.tiny)


def run_all(names: list[str], place: Place, results: str | None, seconds: float) -> dict[str, str]:
    """Each part in a process of its own, until all time is up; how each one ended."""
    until, ended = time.monotonic() + seconds, {}
    for name in names:
        left = min(PARTS[name].seconds, until - time.monotonic())
        if left < 5:
            ended[name] = "skipped: no time left"
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", name, "--here"]
        command += ["--device", place.device.type] + (["--tiny"] if place.tiny else [])
        command += ["--results", results] if results else []
        try:
            done = subprocess.run(command, timeout=left)
            ended[name] = "through" if done.returncode == 0 else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            ended[name] = f"ended after {left:.0f} s"
        print(f"{name}: {ended[name]}", flush=True)
    return ended


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the mini networks, few rounds")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--results", help="where to write (default: results/)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = args.parts or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"unknown parts {', '.join(unknown)}; they are {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; --device cpu --tiny tries every part")
    place = Place(torch.device(args.device), args.tiny)
    if args.here:
        for name in names:
            run_part(name, place, args.results)
        return
    ended = run_all(names, place, args.results, args.minutes * 60)
    if not any(said == "through" for said in ended.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
