"""Learning tasks one after the other, by any strategy, and the score matrix that comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from kdc.continual.learner import Learner, Learnt, in_pipeline
from kdc.continual.matrix import ScoreMatrix
from kdc.continual.records import Counts, Records
from kdc.continual.strategies import STRATEGIES, RankOneFisher, Strategy, find_strategy
from kdc.continual.tasks import Task, split_classes
from kdc.distillation.distill import LAYOUT, check_fit
from kdc.distillation.losses import LossWeights
from kdc.distillation.step import forward_process
from kdc.io import fingerprint
from kdc.replay.buffer import ReplayBuffer
from kdc.training.settings import TrainSettings

__all__ = [
    "STRATEGIES",
    "Evaluate",
    "SequenceResult",
    "Strategy",
    "Task",
    "learn_first",
    "run_sequence",
    "split_classes",
]

Evaluate = Callable[[StableDiffusionPipeline, Task], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class SequenceResult:
    """The matrices by metric, and what every task cost: a row a task, see `records.Counts`."""

    matrices: dict[str, ScoreMatrix]
    counts: pd.DataFrame

    @property
    def matrix(self) -> ScoreMatrix:
        """The matrix of the first metric."""
        return next(iter(self.matrices.values()))


def run_sequence(
    tasks: Sequence[Task],
    strategy: str | Strategy,
    student: UNet2DConditionModel,
    teacher: StableDiffusionPipeline,
    *,
    steps: int,
    evaluate: Evaluate,
    higher_is_better: Mapping[str, bool],
    buffer: ReplayBuffer | None = None,
    reference: Task | None = None,
    ahead: bool = True,
    first: Learnt | None = None,
    batch_size: int = 32,
    weights: LossWeights | None = None,
    learning_rate: float = 5e-4,
    caption_dropout: float = 0.1,
    ema_decay: float = 0.999,
    save_every: int = 500,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = False,
) -> SequenceResult:
    """Train `student` in place on one task after the other, and score it after each.

    Every task takes `steps` steps of `batch_size` new images with the loss `weights` (default:
    the task term alone), whatever the strategy; see `Strategy` for what may come on top. A `buffer`
    is empty at first and takes in each task once it is learnt.

    `evaluate(pipeline, task)` gives a number for each metric of `higher_is_better`, {"accuracy":
    True, ...}, with the student in the pipeline. It is asked for every task before the first
    and after each, with `ahead` False only for tasks already learnt; and always for `reference`,
    what should be kept beyond the tasks. It must draw nothing random but from seeds of its own.

    `first` is the student after the first task, learnt before by `learn_first` with the same
    settings: what comes out is the same, bit for bit, and strategies that part only then learn the
    first task but once.

    With an `output_dir` a sequence that was stopped anywhere goes on with `resume`, and on one CPU
    ends with the same weights and the same matrix, bit for bit. The student after each task stays
    there as `task-<t>/unet`.

    Raises `ValueError` before any work for what cannot be run, and where `resume` finds another
    experiment; `FileExistsError` where a new sequence would mix with an earlier one.
    """
    strategy, weights = find_strategy(strategy), weights or LossWeights.only("task")
    settings = TrainSettings(
        steps, learning_rate, warmup=min(20, steps), ema_decay=ema_decay, save_every=save_every
    )
    every = [*tasks] + ([reference] if reference else [])
    _check(every, strategy, student, teacher, weights, buffer, higher_is_better)
    if batch_size < 1 or not 0 <= caption_dropout <= 1:
        raise ValueError("batch_size must be at least 1 and caption_dropout between 0 and 1")
    if first and strategy.begins_its_own_way:
        raise ValueError(f"{strategy.name} learns the first task in its own way: leave first out")
    if strategy.source == "last_sample" and buffer is None:
        buffer = ReplayBuffer(policy="last_sample", dtype="float32", seed=seed)
    device = PartialState().device
    teacher.to(device)
    student.to(device).eval()
    identity = {
        "strategy": dataclasses.asdict(strategy),
        "tasks": [task.name for task in every],
        "data": [
            fingerprint(d.mean, d.embeddings, d.caption_index) for d in (t.train for t in every)
        ],
        "training": dataclasses.asdict(settings),
        "batch_size": batch_size,
        "weights": dataclasses.asdict(weights),
        "caption_dropout": caption_dropout,
        "seed": seed,
        "student": {n: str(student.config[n]) for n in LAYOUT},
        "teacher": fingerprint(*teacher.unet.state_dict().values()),
        "buffer": None if buffer is None else buffer.settings(),
        "higher_is_better": dict(higher_is_better),
        "ahead": ahead,
        "first": fingerprint(*first.weights.values()) if first else None,
    }
    fisher = RankOneFisher() if strategy.ewc else None
    records = Records(output_dir, identity, student, buffer, fisher)
    records.begin(resume)
    run = Learner(
        tasks, strategy, student, teacher, buffer, fisher, weights, settings, batch_size,
        caption_dropout, seed, first,
    )  # fmt: skip
    for t in range(-1 if ahead or reference else 0, len(tasks)):
        if t >= records.learnt:
            counts = run.learn(t, records)
            records.finish(t, counts)
        asked = range(len(tasks)) if ahead else range(t + 1)
        for k in [*asked, *([len(tasks)] if reference else [])]:
            if not records.has_score(t, k):
                scores = dict(evaluate(in_pipeline(teacher, student), every[k]))
                if set(scores) != set(higher_is_better):
                    raise ValueError(
                        f"evaluate gave {sorted(scores)}, but higher_is_better names {sorted(higher_is_better)}"
                    )
                records.add_score(t, k, scores)
    return _result(records, tasks, higher_is_better, reference)


def learn_first(
    task: Task, student: UNet2DConditionModel, teacher: StableDiffusionPipeline, **settings
) -> Learnt:
    """Train `student` in place on the first task of sequences, whose `first` comes of it.

    `settings` are those of `run_sequence`, `steps` among them; they must be the sequences' own.
    """
    said = {"evaluate": lambda pipeline, task: {"none": 0.0}, "higher_is_better": {"none": True}}
    result = run_sequence([task], "finetune", student, teacher, ahead=False, **said, **settings)
    weights = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
    return Learnt(weights, Counts(**result.counts.to_dict("records")[0]))


def _check(every, strategy, student, teacher, weights, buffer, higher_is_better) -> None:
    check_fit(student, teacher.unet, forward_process(teacher), weights)
    if PartialState().num_processes > 1:
        raise ValueError("a sequence runs in one process: launch it without several")
    names = [task.name for task in every]
    if not every or len(set(names)) < len(names):
        raise ValueError(f"tasks must have names of their own, not {names}")
    if not higher_is_better or any(type(v) is not bool for v in higher_is_better.values()):
        raise ValueError(
            f"higher_is_better must say True or False for each metric: {dict(higher_is_better)}"
        )
    unet = student.config
    shape = (unet.in_channels, unet.sample_size, unet.sample_size)
    for task in every:
        if task.train.mean.shape[1:] != shape:
            raise ValueError(
                f"{task.name!r} has latents of {tuple(task.train.mean.shape[1:])}, the student "
                f"takes {shape}"
            )
    if strategy.source == "buffer" and buffer is None:
        raise ValueError(f"{strategy.name} needs a buffer: buffer=kdc.ReplayBuffer(...)")
    if strategy.source == "last_sample" and buffer is not None and buffer.policy != "last_sample":
        raise ValueError(f"last_sample needs a buffer of its own policy, not {buffer}")
    if buffer is not None and strategy.source not in ("buffer", "last_sample"):
        raise ValueError(f"{strategy.name} uses no buffer: leave it out")


def _result(records: Records, tasks, higher_is_better, reference) -> SequenceResult:
    rows, columns = len(tasks), len(tasks) + bool(reference)
    matrices = {}
    for metric, higher in higher_is_better.items():
        table = np.full((rows + 1, columns), np.nan)
        for (t, k), scores in records.scores.items():
            table[t + 1, k] = scores[metric]
        start = table[0, :rows]
        matrices[metric] = ScoreMatrix(
            table[1:, :rows],
            higher,
            metric,
            tuple(task.name for task in tasks),
            None if np.isnan(start).all() else start,
            table[:, -1] if reference else None,
        )
    frame = pd.DataFrame(records.counts, index=[task.name for task in tasks])
    return SequenceResult(matrices, frame)
