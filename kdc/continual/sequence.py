"""Learning tasks one after the other, by any strategy, and the score matrix that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from kdc.checks import MOST_SEEDS, whole_number
from kdc.continual.learner import Learner, Learnt
from kdc.continual.matrix import ScoreMatrix
from kdc.continual.mechanisms.base import Counts, Run, old_images
from kdc.continual.records import SEQUENCE_FILES, Records, check_begun, is_begun
from kdc.continual.strategies import Strategy, find_strategy
from kdc.continual.tasks import Task
from kdc.distillation.distill import check_fit, identity_of, identity_of_data
from kdc.distillation.losses import LossWeights
from kdc.distillation.step import forward_process
from kdc.io import fingerprint, hash_text, plain
from kdc.pipelines import in_pipeline
from kdc.processes import first_of_all, locked, this_process
from kdc.replay.buffer import ReplayBuffer
from kdc.training.efficiency import refuse_unusable
from kdc.training.loop import check_run, identity_of_run
from kdc.training.settings import TrainSettings

Evaluate = Callable[[StableDiffusionPipeline, Task], Mapping[str, float]]


@dataclass(frozen=True)
class SequenceResult:
    """What a sequence of tasks came to."""

    # The score matrix of each metric.
    matrices: dict[str, ScoreMatrix]
    # What every task cost: a row a task, see `mechanisms.base.Counts`.
    counts: pd.DataFrame
    # The log of the loss terms of every task.
    logs: tuple[pd.DataFrame, ...]

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
    evaluate: Evaluate,
    higher_is_better: Mapping[str, bool],
    buffer: ReplayBuffer | None = None,
    reference: Task | None = None,
    ahead: bool = True,
    first: Learnt | None = None,
    settings: TrainSettings | None = None,
    weights: LossWeights | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    **changes,
) -> SequenceResult:
    """Train `student` in place on one task after the other, and score it after each.

    `changes` are fields of `TrainSettings` put over `settings`: every task takes `steps` steps of
    `batch_size` new images with the loss `weights` (default: the task term alone), whatever the
    strategy; see `Strategy` for what may come on top. A `buffer` is empty at first and takes in
    each task once it is learnt.

    `evaluate(pipeline, task)` gives a number for each metric of `higher_is_better`, {"accuracy":
    True, ...}, with the student in the pipeline. It is asked for every task before the first
    and after each, with `ahead` False only for tasks already learnt; and always for `reference`,
    what should be retained beyond the tasks. It must draw nothing random but from seeds of its own.

    `first` is the student after the first task, learnt before by `learn_first` with the same
    settings: what comes out is the same, bit for bit, and strategies that part only then learn the
    first task but once.

    With an `output_dir` a sequence that was stopped anywhere goes on with `resume`, and on one CPU
    ends with the same weights and the same matrix, bit for bit. The student after each task stays
    there as `task-<t>/unet`.

    Raises, before any work, `TypeError` for an unknown setting, `ValueError` for what cannot be run
    and where `resume` finds another experiment, `FileExistsError` where a new sequence would mix
    with an earlier one, another `OSError` where nothing can be written, and `RuntimeError` where
    another process writes there. A task whose files are damaged is learnt again from the one
    before, with a warning; `ValueError` where none is whole.
    """
    settings = TrainSettings.given(settings, changes)
    strategy, weights = find_strategy(strategy), weights or LossWeights.only("task")
    folder, identity = check_sequence(
        strategy,
        student,
        teacher,
        buffer=buffer,
        settings=settings,
        weights=weights,
        output_dir=output_dir,
        resume=resume,
    )
    every = [*tasks] + ([reference] if reference else [])
    _check_tasks(every, teacher, higher_is_better)
    if first and strategy.mechanism.own_first_task:
        raise ValueError(f"{strategy.name} learns the first task in its own way: leave first out")
    device = this_process().device
    teacher.to(device)
    student.to(device).eval()
    labels = dict.fromkeys(label for task in tasks for label in task.labels)
    run = Run(
        tasks=tasks,
        label_numbers={label: number for number, label in enumerate(labels)},
        student=student,
        teacher=teacher,
        buffer=buffer,
        weights=weights,
        settings=settings,
        ratio=strategy.ratio,
    )
    mechanism = strategy.mechanism(run, **strategy.options)
    identity |= {
        "tasks": [task.name for task in every],
        "labels": [hash_text(*task.labels) for task in tasks],
        "data": [identity_of_data(task.train) for task in every],
        "higher_is_better": dict(higher_is_better),
        "ahead": ahead,
        "first": fingerprint(*first.weights.values()) if first else None,
    }
    if not (folder and is_begun(folder)):
        mechanism.begin_sequence()
    this_process().wait_for_everyone()  # all have looked at the folder before one writes there
    with locked(folder):
        records = Records(folder, identity, student, mechanism)
        records.begin(resume)
        learner = Learner(run, strategy, mechanism, first)
        for t in range(-1 if ahead or reference else 0, len(tasks)):
            if t >= records.learnt:
                records.finish(t, *learner.learn(t, records))
            asked = range(len(tasks)) if ahead else range(t + 1)
            for k in [*asked, *([len(tasks)] if reference else [])]:
                if not records.has_score(t, k):
                    scores = first_of_all(dict(evaluate(in_pipeline(teacher, student), every[k])))
                    if set(scores) != set(higher_is_better):
                        raise ValueError(
                            f"evaluate gave {sorted(scores)}, but higher_is_better names "
                            f"{sorted(higher_is_better)}"
                        )
                    records.add_score(t, k, scores)
    return _result(records, tasks, higher_is_better, reference)


def learn_first(
    task: Task, student: UNet2DConditionModel, teacher: StableDiffusionPipeline, **settings
) -> Learnt:
    """Train `student` in place on the first task of sequences, whose `first` comes of it.

    `settings` are those of `run_sequence`, `steps` among them; they must be the sequences' own.
    """
    result = run_sequence(
        [task],
        "finetune",
        student,
        teacher,
        ahead=False,
        evaluate=lambda pipeline, task: {"none": 0.0},
        higher_is_better={"none": True},
        **settings,
    )
    weights = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
    counts = Counts(**result.counts.to_dict("records")[0])
    return Learnt(weights, counts, result.logs[0])


def check_sequence(
    strategy: Strategy,
    student: UNet2DConditionModel,
    teacher: StableDiffusionPipeline,
    *,
    buffer: ReplayBuffer | None,
    settings: TrainSettings,
    weights: LossWeights,
    output_dir: str | Path | None,
    resume: bool,
) -> tuple[Path | None, dict[str, Any]]:
    """All that can be known of a sequence before its images are encoded; raises as `run_sequence`.

    Returns the folder, `~` resolved, and what is known so far of what a run that resumes must
    share, in plain values.
    """
    process = forward_process(teacher)
    check_fit(student, teacher, process, weights)
    processes = this_process().num_processes
    if processes > 1:
        if strategy.mechanism.one_process:
            raise ValueError(
                f"{strategy.name} runs in one process ({strategy.mechanism.one_process}): launch it"
                " without several"
            )
        mechanism, images = strategy.mechanism, settings.batch_size * processes
        if settings.shard_weights and mechanism.touches_weights():
            raise ValueError(
                f"{strategy.name} looks at whole weights or gradients between the passes: leave"
                " shard_weights out"
            )
        old = old_images(strategy.ratio, images)
        if old % processes and (mechanism.uses_buffer or mechanism.needs_old_model):
            raise ValueError(
                f"{strategy.name} adds {old} old images to {settings.batch_size} x {processes} new"
                f" ones, which {processes} processes cannot share: choose batch_size and ratio so"
                " that it divides"
            )
    if strategy.mechanism.uses_buffer and buffer is None:
        raise ValueError(f"{strategy.name} needs a buffer: buffer=kdc.ReplayBuffer(...)")
    if buffer is not None and not strategy.mechanism.uses_buffer:
        raise ValueError(f"{strategy.name} uses no buffer: leave it out")
    whole_number("seed", settings.seed, 0, MOST_SEEDS)
    device = this_process().device
    refuse_unusable(settings.compile, settings.gradient_checkpointing, device)
    folder = check_run(output_dir, resume, settings, SEQUENCE_FILES)
    identity = identity_of_run(settings) | {
        "steps": settings.steps,
        "strategy": strategy.to_dict(),
        "weights": weights.to_dict(),
        "frozen": [name for name, p in student.named_parameters() if not p.requires_grad],
        "buffer": None if buffer is None else buffer.settings(),
    }
    identity = plain(identity | identity_of(student, teacher, process))
    if folder and is_begun(folder):
        check_begun(folder, resume, identity)
    return folder, identity


def _check_tasks(every, teacher, higher_is_better) -> None:
    names = [task.name for task in every]
    if not every or len(set(names)) < len(names):
        raise ValueError(f"tasks must have names of their own, not {names}")
    if not higher_is_better or any(type(v) is not bool for v in higher_is_better.values()):
        raise ValueError(
            f"higher_is_better must say True or False for each metric: {dict(higher_is_better)}"
        )
    unet = teacher.unet.config
    shape = (unet.in_channels, unet.sample_size, unet.sample_size)
    for task in every:
        if task.train.mean.shape[1:] != shape:
            raise ValueError(
                f"{task.name!r} has latents of {tuple(task.train.mean.shape[1:])}, the student "
                f"takes {shape}"
            )


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
    return SequenceResult(matrices, frame, tuple(records.logs))
