"""A distillation step of `kdc.distill` against the plain loop's, interleaved in one process.

    python benchmarks/distill_step.py mini
    python benchmarks/distill_step.py full [--device cuda] [--compile]

Writes `results/distill_step_mini.json` or `results/distill_step_full.json`. See `reference.py` for
what the plain loop does, `floor.py` for what the floor is, `contenders.peak_of_step` for how memory
is measured: each contender's in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kdc
from benchmarks import floor, setups
from benchmarks.contenders import Contender, peak_of_step, waiting
from benchmarks.reference import train_plainly
from kdc.pipelines import with_unet
from kdc.training.loop import has_bf16
from studies.common import ledger

GOALS = {"mini": {"equal": 2.0, "memory": 0.75}, "full": {"equal": 1.4, "chosen": 2.5}}
SIZES = {"mini": {"batch_size": 16, "rounds": 29}, "full": {"batch_size": 1, "rounds": 5}}
WARMUP = 2
NAMES = {
    "reference": "the plain loop",
    "other seed": "the plain loop once more with another seed: what differs by chance",
    "ours": "kdc.distill in float32",
    "compiled": "kdc.distill in float32, compile=True",
    "checkpointed": "kdc.distill in float32, gradient_checkpointing=True",
    "channels last": "kdc.distill in float32, both networks in that memory format",
    "chosen": "kdc.distill in the precision it chooses itself on this device",
    "chosen, compiled": "the same, compile=True",
}


def loop_of(
    name: str, setup: setups.Setup, student, batch_size: int, steps: int
) -> Callable[[Callable], object]:
    """The training loop of that contender, as `Contender` calls it."""
    common = dict(
        steps=steps,
        batch_size=batch_size,
        learning_rate=setup.learning_rate,
        ema_decay=setup.ema_decay,
    )
    if name in ("reference", "other seed"):
        common["seed"] = int(name == "other seed")
        return lambda wait: train_plainly(
            student, setup.pipeline, setup.images, setup.captions, wait=wait, **common
        )
    if name == "channels last":  # a copy of the teacher, whose weights the others share
        teacher = copy.deepcopy(setup.pipeline.unet).to(memory_format=torch.channels_last)
        student.to(memory_format=torch.channels_last)
        setup = dataclasses.replace(setup, pipeline=with_unet(setup.pipeline, teacher))
    common |= {
        "ours": {"precision": "no"},
        "compiled": {"precision": "no", "compile": True},
        "checkpointed": {"precision": "no", "gradient_checkpointing": True},
        "channels last": {"precision": "no"},
        "chosen": {"precision": "auto"},
        "chosen, compiled": {"precision": "auto", "compile": True},
    }[name]
    return lambda wait: kdc.distill(
        student, setup.pipeline, waiting(setup.cache, wait), label=name, **common
    )


def start(
    names: list[str], setup: setups.Setup, batch_size: int, steps: int
) -> dict[str, Contender]:
    """Contenders that stand before their first step, each with a student of its own if it can."""
    shared = kdc.slim(setup.pipeline.unet, setups.PLAN) if setup.shared else None
    contenders = {}
    for name in names:
        student = setups.twin(shared) if shared else kdc.slim(setup.pipeline.unet, setups.PLAN)
        loop = loop_of(name, setup.alone(), student, batch_size, steps)
        contenders[name] = Contender(loop, torch.get_num_threads())
    return contenders


def race(names: list[str], setup: setups.Setup, device, batch_size: int, rounds: int):
    """Seconds of a step as `kdc.measure_latency` gives them, and the loss curves."""
    steps = WARMUP + rounds
    contenders = start(names, setup, batch_size, steps)
    calls = {name: one.step for name, one in contenders.items()}
    times = kdc.measure_latency(calls, rounds=rounds, warmup=WARMUP, device=device)
    curves = {}
    for name, one in contenders.items():
        if isinstance(one.result, pd.DataFrame):
            curves[name] = dict(zip(one.result["step"], one.result["loss"], strict=True))
        else:
            curves[name] = dict(enumerate(one.result, 1))
    return times, curves


def peak(size: str, name: str, device: str, batch_size: int, steps: int = 2) -> dict[str, int]:
    """Peak memory of a step of one contender, measured in a process of its own."""
    command = [sys.executable, __file__, size, "--device", device, "--peak-of", name]
    command += ["--batch-size", str(batch_size), "--rounds", str(steps)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare_curves(curves: dict[str, dict[int, float]]) -> dict:
    """How far our losses are from the plain loop's of the same seed, against another seed's."""
    plain, out = curves["reference"], {}
    for name, curve in curves.items():
        if name != "reference":
            gaps = [abs(value - plain[step]) / plain[step] for step, value in curve.items()]
            out[name] = {"steps": list(curve), "largest_relative_difference": max(gaps)}
    return out | {"losses": {n: {s: round(v, 6) for s, v in c.items()} for n, c in curves.items()}}


def floors(setup: setups.Setup, device, batch_size: int) -> dict:
    """Seconds of the products of a step alone, and what bf16 does to a large product here."""
    unet, cache = setup.pipeline.unet, setup.cache
    student = kdc.slim(unet, setups.PLAN).train()
    prompt_embeds = cache.embeddings[:1].repeat(batch_size, 1, 1).to(device)
    latents = torch.randn(batch_size, *cache.mean.shape[1:], device=device)
    inputs = latents, torch.full((batch_size,), 500, device=device), prompt_embeds
    recorder, macs = floor.record_step(student, unet, inputs)
    rate = floor.square_product_rate(device)
    bf16 = floor.square_product_rate(device, torch.bfloat16)
    return {
        "macs": macs,
        "products_alone_seconds": floor.seconds_of_products(recorder, device),
        "large_square_product_macs_per_second": rate,
        "seconds_at_that_rate": macs / rate,
        "bf16_over_float32_rate_of_that_product": bf16 / rate,
    }


def as_ratios(times: pd.DataFrame, batch_size: int) -> dict:
    """Images per second and, over the plain loop's of the same round, median and quartiles."""
    return {
        name: {
            "images_per_second": batch_size / row["median"],
            "seconds": row["median"],
            "seconds_quartiles": [row["low"], row["high"]],
            "images_over_reference": 1 / row["ratio"],
            "images_over_reference_quartiles": [1 / row["ratio_high"], 1 / row["ratio_low"]],
        }
        for name, row in times.iterrows()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 29 mini, 5 full)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: 16 mini, 1 full)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="a compiled contender as well")
    parser.add_argument("--results", help="where to write (default: results/)")
    parser.add_argument("--peak-of", choices=list(NAMES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(args.threads)
    rounds = args.rounds or SIZES[args.size]["rounds"]
    batch_size = args.batch_size or SIZES[args.size]["batch_size"]
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.peak_of:
        setup = getattr(setups, args.size)(device)
        one = start([args.peak_of], setup, batch_size, rounds + 1)[args.peak_of]
        one.step()  # the optimiser's state, and what is compiled
        peaks = [peak_of_step(one.step, device) for _ in range(rounds)]
        print(json.dumps(max(peaks, key=lambda p: p["peak"])), flush=True)
        os._exit(0)  # the contender's thread stands in the middle of its training

    names = ["reference", "ours"] + ["compiled"] * args.compile
    if args.size == "mini":
        names = ["reference", "other seed", "ours"] + names[2:] + ["checkpointed", "channels last"]
    bf16 = has_bf16(device)
    peak_of = functools.partial(peak, args.size, device=args.device, batch_size=batch_size)
    measured = [name for name in names if name != "other seed"] + ["chosen"] * bf16
    # Before the race, so that the race, which takes longest, is written down as soon as it is over.
    peaks = {name: peak_of(name) for name in measured}

    setup = getattr(setups, args.size)(device)
    values = {"size": args.size, "batch_size": batch_size, "rounds": rounds, "names": NAMES}
    values["floor"] = floors(setup, device, batch_size)
    times, curves = race(names, setup, device, batch_size, rounds)
    values["contenders"] = as_ratios(times, batch_size)
    if args.size == "mini":
        values["curves"] = compare_curves(curves)
    values["chosen_precision"] = "bf16" if bf16 else "float32"
    if bf16:
        again, _ = race(["reference", "chosen"], setup, device, batch_size, rounds)
        values["contenders"]["chosen"] = as_ratios(again, batch_size)["chosen"]
    for name, bytes_ in peaks.items():
        values["contenders"][name] |= {f"{k}_bytes": v for k, v in bytes_.items()}
    report(values, GOALS[args.size])
    settings = {"rounds": rounds, "batch_size": batch_size, "threads": args.threads}
    path = ledger.write(f"distill_step_{args.size}", values, args.results, **settings)
    print(f"written to {path}")


def report(values: dict, goals: dict[str, float]) -> None:
    """Print what was measured, and put beside the goals what was reached."""
    reference, alone = values["contenders"]["reference"], values["floor"]["products_alone_seconds"]
    for row in values["contenders"].values():
        row["seconds_over_floor"] = row["seconds"] / alone
        if "peak_bytes" in row:
            row["peak_over_reference"] = row["peak_bytes"] / reference["peak_bytes"]
    table = pd.DataFrame(values["contenders"]).T
    shown = ["images_per_second", "images_over_reference", "images_over_reference_quartiles"]
    shown += ["peak_bytes", "peak_over_reference", "seconds_over_floor"]
    print(table[shown].to_string())
    best = {name: row for name, row in values["contenders"].items() if name in NAMES}
    equal = [n for n in ("compiled", "ours") if n in best]
    reached = {"equal": max(best[n]["images_over_reference"] for n in equal)}
    fastest = max(equal, key=lambda n: best[n]["images_over_reference"])
    reached["memory"] = best[fastest]["peak_over_reference"]
    chosen = best.get("chosen")
    reached["chosen"] = chosen["images_over_reference"] if chosen else reached["equal"]
    values["goals"] = {
        name: {
            "goal": goal,
            "reached": reached[name],
            "met": bool(reached[name] <= goal if name == "memory" else reached[name] >= goal),
        }
        for name, goal in goals.items()
    }
    print(json.dumps(values["goals"], indent=2))
    print(f"Precision chosen here: {values['chosen_precision']}.")


if __name__ == "__main__":
    main()
