"""What the replay buffer costs beside a training step: `python -m benchmarks.replay`.

In every round one step of distillation is timed, and for each policy and precision, in turn, the
adding of a batch of new items to a full buffer and the sampling of a batch. Rounds are interleaved,
so that whatever else the machine does falls on all alike; the first rounds warm up and are not
counted. Writes the medians, the quartiles and their share of the step to
`results/replay_cost.json`; the goal is a share of adding and sampling together below 1 %.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm.auto import trange

import kdc
from kdc import LatentDataset, LossWeights, ReplayBuffer
from kdc.distillation.step import DistillationStep, forward_process
from kdc.replay.policies import POLICIES
from studies.common import ledger

GOAL = 0.01
DTYPES = ("float16", "int8")


def made_up(teacher: StableDiffusionPipeline, count: int, classes: int) -> LatentDataset:
    """Random latents in the teacher's shapes: what they show does not change what they cost."""
    unet, g = teacher.unet.config, torch.Generator().manual_seed(0)
    shape = (count, unet.in_channels, unet.sample_size, unet.sample_size)
    words = (classes, teacher.tokenizer.model_max_length, unet.cross_attention_dim)
    embeddings = torch.randn(words, generator=g)
    return LatentDataset(
        torch.randn(shape, generator=g),
        0.1 * torch.rand(shape, generator=g),
        embeddings,
        torch.arange(count) % classes,
        torch.zeros_like(embeddings[0]),
        [f"class {i}" for i in range(classes)],
    )


def training_step(teacher: StableDiffusionPipeline, data: LatentDataset, batch: int) -> Callable:
    """One step of distillation with every term: forwards, backwards and AdamW."""
    student = kdc.slim(teacher.unet, "kdc").to(teacher.device)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-5)
    distillation_step = DistillationStep(
        student, teacher.unet, forward_process(teacher), LossWeights()
    )
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        distillation_step(student, *data.draw(batch, generator), generator)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if teacher.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def full_buffers(data: LatentDataset, capacity: int, folder: str | None) -> dict:
    """A full buffer of every policy and precision; one of them also on disk."""
    kinds = [(p, d, None) for p, d in itertools.product(POLICIES, DTYPES)]
    kinds += [("reservoir", "float16", folder)]
    buffers = {}
    for policy, dtype, where in kinds:
        buffer = ReplayBuffer(capacity, policy, dtype, folder=where)
        buffer.add(data, labels=data.caption_index)
        buffers[policy, dtype, "disk" if where else "memory"] = buffer
    return buffers


def _seconds(action: Callable) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(
    teacher: StableDiffusionPipeline, batch: int, capacity: int, rounds: int, warmup: int, folder
) -> tuple[list[float], dict]:
    """Seconds of every counted round: of the step, and of (adding, sampling) by kind of buffer."""
    data = made_up(teacher, capacity, classes=12)
    step, buffers = training_step(teacher, data, batch), full_buffers(data, capacity, folder)
    rows, steps, times = torch.arange(batch), [], {kind: [] for kind in buffers}
    for number in trange(warmup + rounds, mininterval=2):
        seconds = _seconds(step)
        costs = {}
        for kind, buffer in buffers.items():
            new, generated = (rows + number * batch) % len(data), min(batch, len(buffer))
            costs[kind] = (
                _seconds(lambda b=buffer, r=new: b.add(data, r, labels=data.caption_index[r])),
                _seconds(lambda b=buffer, n=generated: b.sample(n)),
            )
        if number >= warmup:
            steps.append(seconds)
            for kind, cost in costs.items():
                times[kind].append(cost)
    return steps, times


def summary(steps: Sequence[float], times: dict) -> dict:
    """Medians and quartiles, and each buffer's median share of a step, by kind."""

    def spread(values) -> dict:
        low, middle, high = np.percentile(values, [25, 50, 75])
        return {"median": middle, "low": low, "high": high}

    rows = []
    for (policy, dtype, where), costs in times.items():
        add, sample = np.array(costs).T
        share = float(np.median(add + sample) / np.median(steps))
        rows.append(
            {
                "policy": policy,
                "dtype": dtype,
                "where": where,
                "add_seconds": spread(add),
                "sample_seconds": spread(sample),
                "share_of_step": share,
                "met": share < GOAL,
            }
        )
    return {"goal": GOAL, "step_seconds": spread(steps), "buffers": rows}


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="mini")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--results", default=None, help="folder (default: results/)")
    args = parser.parse_args(arguments)
    if min(args.batch_size, args.capacity, args.rounds) < 1 or args.warmup < 0:
        parser.error("batch size, capacity and rounds must be at least 1")
    teacher = kdc.load_teacher(args.teacher)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        steps, times = measure(
            teacher, args.batch_size, args.capacity, args.rounds, args.warmup, folder
        )
    settings = {name: v for name, v in vars(args).items() if name != "results"}
    return ledger.write("replay_cost", summary(steps, times), args.results, **settings)


if __name__ == "__main__":
    print(main())
