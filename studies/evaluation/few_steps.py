"""How few steps a student can draw in: consistency distillation of the shipped student.

Claimed before it was measured: drawn in at most four steps, without the second call that guidance
costs, the student is end to end at least `FASTER` times as fast as the teacher at 50 steps, and its
accuracy is at most `LOSS` below the teacher's. A time ratio below, or an interval over seeds of the
difference in accuracy that lies wholly below, refutes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from diffusers import StableDiffusionPipeline
from PIL import Image

from kdc.data import worlds
from kdc.data.cache import cache_latents
from kdc.data.datasets import load_dataset
from kdc.data.latents import LatentDataset
from kdc.distillation.few_steps import distill_few_steps
from kdc.evaluation.extractors import find_extractor
from kdc.evaluation.metrics import Evidence, means, score
from kdc.evaluation.statistics import student_interval
from kdc.io import fingerprint, make_once
from kdc.pipelines import generate, in_few_steps, load_student, with_unet
from kdc.unet.costs import measure_latency
from studies.common import ledger
from studies.common.protocol import cut, strip
from studies.common.renderings import renderings_of
from studies.distillation.study import SHOWN
from studies.evaluation.study import SHIPPED, asked_for

FASTER, LOSS = 12.0, 0.05
FEW = "few-step student"
# What is shown of it: who draws, in how many steps.
DRAWN = (("teacher", 50), ("teacher", 2), (SHIPPED, 2), (FEW, 1), (FEW, 2), (FEW, 4))


@dataclass(frozen=True)
class Settings:
    """How long the students are trained, and what is asked of them."""

    # One training each; drawn with a seed of its own.
    seeds: tuple[int, ...] = (0, 1, 2)
    # Updates of each training; with the rate, as in a trial on seed 100 (accuracy .99 at 2 steps).
    updates: int = 400
    batch_size: int = 16
    learning_rate: float = 1e-4
    # Training images of the worlds.
    images: int = 1600
    # What is folded in.
    guidance: float = 7.5
    # Steps of the sampler whose path is shortened.
    grid: int = 50
    # Denoising steps at which the students are drawn with.
    steps: tuple[int, ...] = (1, 2, 4, 8)
    # Images of each set.
    generated: int = 144
    # The teacher's steps, to which all is compared.
    goal_steps: int = 50
    # Rounds of the clock.
    rounds: int = 7


def study(
    teacher: StableDiffusionPipeline, settings: Settings, folder: Path
) -> tuple[list[dict], list[dict], np.ndarray]:
    """Scores of teacher, shipped student and few-step students, seconds an image, and images.

    A row each: "pipeline", "steps", "guidance", "seed" and the scores; "pipeline", "steps",
    "median", "low", "high", "ratio" over the teacher at `goal_steps`. The images are strips of
    `SHOWN`, one for each of `DRAWN`, by the first student. Trainings and rows are kept in `folder`,
    from which a study that was stopped goes on.
    """
    student = load_student("mini", teacher)
    data: LatentDataset | None = None
    rows, few, first = [], None, None
    for seed in settings.seeds:
        for name, pipeline in (("teacher", teacher), (SHIPPED, student)):
            rows.append(_scored(name, pipeline, settings.goal_steps, 7.5, seed, settings, folder))
            for steps in settings.steps:
                rows.append(_scored(name, pipeline, steps, 7.5, seed, settings, folder))
        place = folder / f"few-steps-{seed}-{settings.updates}"
        unet = load_student("mini", teacher).unet
        data = data or cache_latents(teacher, load_dataset("worlds", count=settings.images))
        distill_few_steps(
            unet,
            teacher,
            data,
            guidance=settings.guidance,
            grid=settings.grid,
            steps=settings.updates,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            seed=seed,
            output_dir=place,
            resume=True,
            label=f"few steps, seed {seed}",
        )
        few = in_few_steps(with_unet(teacher, unet), settings.grid)
        first = first or few
        for steps in settings.steps:
            rows.append(_scored(FEW, few, steps, 1.0, seed, settings, folder))
    drawn = {"teacher": (teacher, 7.5), SHIPPED: (student, 7.5), FEW: (first, 1.0)}
    strips = []
    for name, steps in DRAWN:
        pipeline, guidance = drawn[name]
        strips.append(strip(pipeline, SHOWN, steps, guidance=guidance))
    return rows, _timed(teacher, student, few, settings), np.concatenate(strips)


def shown(results: str | Path | None = None) -> tuple[dict[str, list[np.ndarray]], tuple[str, ...]]:
    """The stored images by pipeline and steps, and their captions."""
    file = Path(results or ledger.RESULTS) / "evaluation_few_steps.png"
    names = [f"{name}, {steps} step{'s' if steps > 1 else ''}" for name, steps in DRAWN]
    return cut(np.asarray(Image.open(file)), names, len(SHOWN)), SHOWN


def _scored(
    name: str,
    pipeline: StableDiffusionPipeline,
    steps: int,
    guidance: float,
    seed: int,
    settings: Settings,
    folder: Path,
) -> dict:
    asked = asked_for(settings.generated)
    captions = [worlds.caption(a) for a in asked]

    def make() -> dict:
        see = find_extractor("mini-clip")
        evidence = Evidence(
            images=generate(pipeline, captions, seed=seed, steps=steps, guidance=guidance),
            extractor=see,
            prompts=captions,
            attributes=asked,
            reference=see(renderings_of(asked, seed=3)),
        )
        return means(score(evidence, ("accuracy", "clip", "fd"), strict=False)[0])

    made_with = {
        "unet": fingerprint(*pipeline.unet.state_dict().values()),
        "generated": settings.generated,
        "sampler": type(pipeline.scheduler).__name__,
        "guidance": guidance,
    }
    stem = f"{name.replace(' ', '-')}-{steps}-{seed}"
    found = make_once(folder / f"few-{stem}.json", made_with, make)
    return {"pipeline": name, "steps": steps, "guidance": guidance, "seed": seed} | found


def _timed(teacher, student, few, settings: Settings) -> list[dict]:
    """Seconds an image, all interleaved; the first is the teacher at `goal_steps`."""
    prompt = worlds.caption(asked_for(1)[0])
    asked: dict[tuple[str, int], tuple] = {
        ("teacher", settings.goal_steps): (teacher, 7.5),
        **{("teacher", steps): (teacher, 7.5) for steps in settings.steps},
        **{(SHIPPED, steps): (student, 7.5) for steps in (settings.goal_steps, *settings.steps)},
        **{(FEW, steps): (few, 1.0) for steps in settings.steps},
    }
    calls = {
        f"{name}, {steps}": lambda pipeline=pipeline, steps=steps, guidance=guidance: generate(
            pipeline, prompt, steps=steps, guidance=guidance
        )
        for (name, steps), (pipeline, guidance) in asked.items()
    }
    table = measure_latency(calls, rounds=settings.rounds)
    return [
        {"pipeline": name, "steps": steps} | table.loc[f"{name}, {steps}"].to_dict()
        for name, steps in asked
    ]


def factors(times: Sequence[Mapping], steps: int) -> dict[str, float]:
    """How the speed of the few-step student at `steps` comes about, as factors of time.

    "slimming" at the teacher's steps, "fewer steps" of the same network, "no second call" for
    guidance; "together" is the product, teacher over few-step student.
    """
    seconds = {(row["pipeline"], row["steps"]): row["median"] for row in times}
    goal = max(step for name, step in seconds if name == "teacher")
    return {
        "slimming": seconds["teacher", goal] / seconds[SHIPPED, goal],
        "fewer steps": seconds[SHIPPED, goal] / seconds[SHIPPED, steps],
        "no second call": seconds[SHIPPED, steps] / seconds[FEW, steps],
        "together": seconds["teacher", goal] / seconds[FEW, steps],
    }


def verdict(rows: Sequence[Mapping], times: Sequence[Mapping], steps: int) -> str:
    """What came of the claim at `steps`: "holds", "refuted", or "open" where the seeds cannot tell.

    The interval is Student's of 95 % over seeds; one seed has none.
    """
    low, high = student_interval(list(lost(rows, steps)))
    if factors(times, steps)["together"] < FASTER or high < -LOSS:
        return "refuted"
    return "holds" if low >= -LOSS else "open"


def lost(rows: Sequence[Mapping], steps: int, goal_steps: int = 50) -> pd.Series:
    """By seed: the accuracy that the few-step student at `steps` has more than the teacher."""
    wide = pd.DataFrame(rows).pivot(index="seed", columns=["pipeline", "steps"], values="accuracy")
    return wide[FEW, steps] - wide["teacher", goal_steps]
