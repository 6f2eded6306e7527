"""Seconds that each strategy takes for the second task: `python -m benchmarks.strategies`.

Every strategy learns the second world after the first, with the loss of the study of chapter 04, in
turn and for some rounds, so that whatever else the machine does falls on all alike. All is a
quarter of that study: its steps, the images that are drawn in advance, those of the Fisher.
Writes the seconds and, over fine-tuning's of the same round, median and quartiles to
`results/strategy_seconds.json`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import kdc
from kdc.continual.sequence import learn_first, run_sequence
from kdc.continual.strategies import STRATEGIES
from studies.common import ledger
from studies.replay import study
from studies.replay.tasks import domain_tasks

PART = 4


def measure(
    steps: int, rounds: int, batch_size: int, strategies: Sequence[str] = tuple(STRATEGIES)
) -> pd.DataFrame:
    """Seconds of the second task: a row for each round, a column for each strategy."""
    teacher = kdc.load_teacher("mini")
    tasks = domain_tasks(teacher, tuple(kdc.WORLDS), images=200, test_images=8, generated=4)
    settings = study.Settings(batch_size=batch_size)
    training = study.training(settings, steps, seed=0)
    fresh = kdc.slim(teacher.unet, settings.plan)
    first = learn_first(tasks[0], copy.deepcopy(fresh), teacher, **training)
    nothing = {"evaluate": lambda pipeline, task: {"none": 0.0}, "higher_is_better": {"none": True}}
    rows = []
    for _ in range(rounds):
        row = {}
        for name in strategies:
            strategy = STRATEGIES[name]
            less = {
                name: max(1, strategy.options[name] // PART)
                for name in ("pool", "fisher_samples")
                if name in strategy.options
            }
            strategy = strategy.replace(**less)
            result = run_sequence(
                tasks,
                strategy,
                copy.deepcopy(fresh),
                teacher,
                buffer=kdc.ReplayBuffer(64) if strategy.mechanism.uses_buffer else None,
                first=None if strategy.mechanism.own_first_task else first,
                ahead=False,
                **nothing,
                **training,
            )
            row[name] = result.counts["seconds"].iloc[1]
        rows.append(row)
    return pd.DataFrame(rows)


def summary(seconds: pd.DataFrame) -> pd.DataFrame:
    """A row for each strategy: its median seconds, and the ratio to fine-tuning's of its round."""
    ratios = seconds.div(seconds["finetune"], axis=0).quantile([0.25, 0.5, 0.75]).T
    ratios.columns = ["ratio_low", "ratio", "ratio_high"]
    return ratios.assign(seconds=seconds.median())


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.strategies")
    parser.add_argument("--steps", type=int, default=study.Settings().steps // PART)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=study.Settings().batch_size)
    parser.add_argument("--results", help="where to write (default: results/)")
    args = parser.parse_args(argv)
    table = summary(measure(args.steps, args.rounds, args.batch_size))
    print(table.round(2).to_string())
    settings = {"steps": args.steps, "rounds": args.rounds, "batch_size": args.batch_size}
    return ledger.write("strategy_seconds", table.to_dict("index"), args.results, **settings)


if __name__ == "__main__":
    print(main())
