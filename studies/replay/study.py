"""What is forgotten when tasks follow one another, and what each strategy saves: rows over seeds.

All variants of one order and seed share the student after the first task, but for the two that
learn it in their own way.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from kdc.continual.learner import Learnt
from kdc.continual.sequence import Evaluate, SequenceResult, learn_first, run_sequence
from kdc.continual.tasks import Task
from kdc.distillation.features import feature_pairs
from kdc.io import fingerprint, make_once, write_image
from kdc.replay.buffer import ReplayBuffer
from kdc.unet.slimming import slim
from studies.common.protocol import slug, strip
from studies.common.recipes import RECIPES, STUDENT_RECIPE
from studies.common.teacher_cache import Answer, remembering
from studies.replay.tasks import Scorer, leakage
from studies.replay.variants import Variant

SHOWN = (  # four of each world
    "a red daisy on a sky background",
    "a purple lily on a meadow background",
    "a yellow rose on a night background",
    "a white tulip on a sand background",
    "a blue eyed butterfly on a night background",
    "a white bordered butterfly on a sand background",
    "an orange striped butterfly on a sky background",
    "a red plain butterfly on a meadow background",
)


@dataclass(frozen=True)
class Settings:
    """How much is measured. The defaults are those of the budget `standard`."""

    plan: str = "kdc"
    images: int = 800  # of each domain, to train on
    test_images: int = 64
    recipe: str = STUDENT_RECIPE  # of `kdc.recipes`, whose loss teaches new images
    steps: int = 80  # of each domain
    class_steps: int = 40  # of each class
    batch_size: int = 8
    learning_rate: float = 5e-4
    generated: int = 72  # for each domain
    generated_photos: int = 256  # of a folder: for each half enough for a Fréchet distance
    sampling_steps: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning: int = 1500  # steps in which the teacher first learns photographs


def follow(
    tasks: Sequence[Task],
    variant: Variant,
    teacher: StableDiffusionPipeline,
    evaluate: Evaluate,
    higher_is_better: Mapping[str, bool],
    settings: Settings,
    *,
    steps: int,
    seed: int,
    reference: Task | None = None,
    ahead: bool = True,
    first: Learnt | None = None,
    start: UNet2DConditionModel | None = None,
) -> tuple[SequenceResult, ReplayBuffer | None]:
    """One sequence with the recipe's loss on new images; `start` as in `study`."""
    buffer = variant.buffer(seed)
    result = run_sequence(
        tasks,
        variant.strategy,
        _begin(teacher, settings, start),
        teacher,
        evaluate=evaluate,
        higher_is_better=higher_is_better,
        buffer=buffer,
        reference=reference,
        ahead=ahead,
        first=first,
        **training(settings, steps, seed),
    )
    return result, buffer


def training(settings: Settings, steps: int, seed: int) -> dict:
    """What every sequence is trained with, the shared first task too."""
    return {
        "steps": steps,
        "batch_size": settings.batch_size,
        "weights": RECIPES[settings.recipe].weights,
        "learning_rate": settings.learning_rate,
        "ema_decay": 0.99,
        "seed": seed,
    }


def study(
    name: str,
    orders: Mapping[str, Sequence[Task]],
    variants: Mapping[str, Variant],
    teacher: StableDiffusionPipeline,
    settings: Settings,
    folder: str | Path,
    *,
    steps: int,
    reference: Task | None = None,
    ahead: bool = True,
    shown: Sequence[str] = (),
    start: UNet2DConditionModel | None = None,
) -> list[dict]:
    """A row for each order, seed and variant; each is stored in `folder` as soon as it is there.

    `reference` and `ahead` are those of `run_sequence`. Sequences begin with a copy of the student
    `start`, or with one freshly cut from the teacher by `settings.plan`. A row holds the matrices
    by metric, the counts by task, and where there is a buffer its `leakage`. The student of the
    first order and seed also generates images for the prompts `shown` after each task, into a sheet
    of strips beside the rows; that goes with `ahead` alone.
    """
    made_with = {k: v for k, v in dataclasses.asdict(settings).items() if k != "seeds"}
    made_with |= {"steps": steps, "teacher": fingerprint(*teacher.unet.state_dict().values())}
    if start is not None:
        made_with |= {"start": fingerprint(*start.state_dict().values())}
    rows = []
    for order, tasks in orders.items():
        for seed in settings.seeds:
            scorer = Scorer(teacher, tasks[0], seed, settings.sampling_steps)
            first = functools.cache(
                functools.partial(_first, tasks[0], teacher, settings, steps, seed, start)
            )
            answers: dict[str, Answer] = {}  # the teacher's, on new images alike for all variants
            draws = shown if order == next(iter(orders)) and seed == settings.seeds[0] else ()
            for label, variant in variants.items():
                stem = stem_of(folder, name, order, label, seed)

                def make(
                    variant=variant,
                    seed=seed,
                    scorer=scorer,
                    tasks=tasks,
                    first=first,
                    draws=draws,
                    stem=stem,
                    answers=answers,
                ) -> dict:
                    strips = []

                    def evaluate(pipeline, asked):
                        if draws and asked is tasks[0]:
                            strips.append(strip(pipeline, draws, settings.sampling_steps))
                        return scorer(pipeline, asked)

                    with remembering(teacher.unet, _hooked(teacher, settings), answers):
                        begun = None if variant.strategy.mechanism.own_first_task else first()
                        result, buffer = follow(
                            tasks, variant, teacher, evaluate, scorer.higher_is_better, settings,
                            steps=steps, seed=seed, reference=reference, ahead=ahead, first=begun,
                            start=start,
                        )  # fmt: skip
                    if draws:  # all strips but the first, which is from before the first task
                        sheet = Image.fromarray(np.concatenate(strips[1:]))
                        write_image(stem.with_suffix(".png"), sheet)
                    return {
                        "matrices": {k: m.to_dict() for k, m in result.matrices.items()},
                        "counts": result.counts.to_dict("list"),
                        "leakage": leakage(buffer, tasks[0], scorer) if buffer else None,
                    }

                known = made_with | {"variant": variant.to_dict(), "seed": seed}
                known |= {"order": [task.name for task in tasks]}
                row = make_once(stem.with_suffix(".json"), known, make)
                rows.append({"candidate": label, "order": order, "seed": seed} | row)
    return rows


def stem_of(folder: str | Path, name: str, order: str, label: str, seed: int) -> Path:
    """Where a sequence's row (.json) and images (.png) lie, without the suffix."""
    return Path(folder) / f"{name}-{slug(order)}-{slug(label)}-{seed}"


def _hooked(teacher: StableDiffusionPipeline, settings: Settings) -> list[str]:
    hooks = RECIPES[settings.recipe].weights.features_at
    return [
        name for _, name in feature_pairs(slim(teacher.unet, settings.plan), teacher.unet, hooks)
    ]


def _first(task, teacher, settings: Settings, steps: int, seed: int, start) -> Learnt:
    student = _begin(teacher, settings, start)
    return learn_first(task, student, teacher, **training(settings, steps, seed))


def _begin(teacher, settings: Settings, start: UNet2DConditionModel | None):
    return slim(teacher.unet, settings.plan) if start is None else copy.deepcopy(start)
