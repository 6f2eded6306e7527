"""Whether the mini teacher is one that slimming can be studied on: what was set beforehand.

1. Bypassing the mid-block, and stage 3, each costs at least `LOSS` of binding accuracy, or at least
   `SHARE` of the outermost layer's error, with an interval that excludes 0.
2. After equal and long recovery the plans order as published, bk-base >= kdc >= bk-tiny, and at
   least one gap is significant.
3. The kdc student, recovered for long, stays measurably below its teacher.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from kdc import pipelines
from kdc.data import scenes
from kdc.data.cache import cache_latents
from kdc.data.datasets import load_dataset
from kdc.data.latents import LatentDataset
from kdc.distillation.distill import distill
from kdc.distillation.fidelity import output_error
from kdc.evaluation.scene_judge import shown_scenes
from kdc.evaluation.statistics import student_interval
from kdc.io import fingerprint, make_once
from kdc.search import sensitivity
from kdc.unet.blocks import plan_without
from kdc.unet.slimming import count_parameters, slim
from studies.common.protocol import slug
from studies.common.recipes import RECIPES, STUDENT_RECIPE
from studies.mini.images import scene_images

LOSS, SHARE = 0.02, 0.001
INNER = ("mid-block", "stage 3")
ORDER = ("bk-base", "kdc", "bk-tiny")  # as published, the best first


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured."""

    seeds: tuple[int, ...] = (0, 1, 2)
    # Updates of the recovery after which plans are compared, the shorter ones first.
    horizons: tuple[int, ...] = (600, 2400)
    batch_size: int = 16
    # Scenes that students are trained on, and held-back scenes for errors.
    images: int = 4000
    test_images: int = 192
    # Held-back scenes of two objects that are drawn, with each seed, in so many steps.
    drawn: int = 200
    sampling_steps: int = 16
    # Scenes and timesteps of each estimate of an error.
    count: int = 32
    levels: int = 4


def bound(pipeline: StableDiffusionPipeline, seed: int, settings: Settings) -> list[int]:
    """For each of some held-back scenes of two objects, whether all attributes are right: 0, 1."""
    _, asked = scene_images(settings.drawn, "test", 100 + seed, False, 2)
    captions = [scenes.caption(scene) for scene in asked]
    images = pipelines.generate(pipeline, captions, seed=seed, steps=settings.sampling_steps)
    return shown_scenes(images, asked)["binding"].int().tolist()


def bypassed(teacher: StableDiffusionPipeline, settings: Settings, folder: Path) -> dict:
    """What bypassing costs.

    "importance": by seed, the error of each part over the outermost layer's. "lost": by inner part
    the binding accuracy that is lost, mean and interval over all scenes, and "teacher", its own.
    """
    test = cache_latents(teacher, load_dataset("scenes", "test", count=settings.test_images))
    made_with = asdict(settings) | {"teacher": fingerprint(*teacher.unet.state_dict().values())}

    def importance(seed: int) -> dict:
        rows = sensitivity(
            teacher, test, draws=1, count=settings.count, levels=settings.levels, guidance=7.5,
            seed=seed,
        )  # fmt: skip
        errors = rows.groupby("part", sort=False)["error"].mean()
        return (errors / errors["layer 0"]).to_dict()

    def drawn(part: str | None, seed: int) -> dict:
        pipeline = teacher
        if part:
            pipeline = pipelines.with_unet(teacher, slim(teacher.unet, plan_without([part])))
        return {"bound": bound(pipeline, seed, settings)}

    found: dict = {"importance": {}, "lost": {}}
    right: dict[str, list[int]] = {}
    for seed in settings.seeds:
        file = folder / f"importance-{seed}.json"
        found["importance"][str(seed)] = make_once(file, made_with, partial(importance, seed))
        for part in (None, *INNER):
            file = folder / f"drawn-{slug(part or 'teacher')}-{seed}.json"
            row = make_once(file, made_with, partial(drawn, part, seed))
            right.setdefault(part or "teacher", []).extend(row["bound"])
    for part in INNER:
        lost = torch.tensor(right["teacher"]).double() - torch.tensor(right[part])
        low, high = student_interval(lost.tolist())
        found["lost"][part] = {"mean": lost.mean().item(), "low": low, "high": high}
    found["teacher"] = sum(right["teacher"]) / len(right["teacher"])
    return found | {"drawn": len(right["teacher"])}


def recovered(teacher: StableDiffusionPipeline, settings: Settings, folder: Path) -> list[dict]:
    """A row for each seed, plan of `ORDER` and horizon: what the student predicts and draws.

    A longer horizon goes on from the shorter one, at a constant learning rate; students are the
    averaged weights.
    """
    train = cache_latents(teacher, load_dataset("scenes", count=settings.images))
    test = cache_latents(teacher, load_dataset("scenes", "test", count=settings.test_images))
    made_with = asdict(settings) | {"teacher": fingerprint(*teacher.unet.state_dict().values())}
    rows = []
    for seed in settings.seeds:
        for plan in ORDER:
            for steps in settings.horizons:
                place = folder / f"{plan}-{seed}"
                known = {"seed": seed, "plan": plan, "steps": steps}

                def row(seed=seed, plan=plan, steps=steps, place=place, known=known) -> dict:
                    student = _recover(teacher, train, plan, seed, steps, place / "run", settings)
                    right = bound(pipelines.with_unet(teacher, student), seed, settings)
                    error = output_error(student, teacher, test, count=settings.count)
                    return known | {
                        "parameters": count_parameters(student),
                        "output_error": error.mean().item(),
                        "binding": sum(right) / len(right),
                    }

                rows.append(make_once(place / f"{steps}.json", made_with | known, row))
    return rows


def _recover(
    teacher: StableDiffusionPipeline,
    train: LatentDataset,
    plan: str,
    seed: int,
    steps: int,
    run: Path,
    settings: Settings,
) -> UNet2DConditionModel:
    """That plan's student after so many steps, going on from what lies in `run`."""
    recipe = RECIPES[STUDENT_RECIPE]
    student = slim(teacher.unet, plan, recipe.init)
    distill(
        student,
        teacher,
        train,
        steps=steps,
        batch_size=settings.batch_size,
        weights=recipe.weights,
        output_dir=run,
        resume=True,
        seed=seed,
        label=f"{plan}, seed {seed}",
        **dict(recipe.training) | {"schedule": "constant_with_warmup"},
    )
    return student
