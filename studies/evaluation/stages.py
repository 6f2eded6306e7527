"""The stages of the study of chapter 06: the clock, how few steps do, students of equal steps."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pandas as pd
from diffusers import StableDiffusionPipeline
from PIL import Image

from kdc.evaluation.compare import compare, retraining
from kdc.pipelines import load_student, load_teacher, save_student
from studies.common import ledger
from studies.common.protocol import Setup, prepare, slug
from studies.common.recipes import RECIPES
from studies.common.runner import Context, Stage
from studies.distillation import study as distillation
from studies.distillation.study import follow
from studies.evaluation import few_steps
from studies.evaluation.study import (
    SHIPPED,
    Settings,
    pipelines,
    plain,
    report,
    scored,
    sweep,
    timed,
)


def _timing(teacher, settings: Settings, context: Context) -> dict:
    images, calls = timed(pipelines(teacher), settings)
    return {"images": images.to_dict("records"), "calls": calls.to_dict("records")}


def _steps(teacher, settings: Settings, context: Context) -> dict:
    candidates = pipelines(teacher)
    generated = sweep(candidates, settings, context.folder)
    times = pd.DataFrame(ledger.read("evaluation_timing", context.results)["images"])
    return report(candidates, generated, times, settings)


def trained(
    teacher: StableDiffusionPipeline, settings: Settings, folder: Path
) -> dict[str, list[StableDiffusionPipeline]]:
    """Students of each recipe after equal steps, one a seed; kept below `folder`."""
    setup: Setup | None = None
    study = distillation.Settings(steps=settings.training_steps)
    students: dict[str, list] = {name: [] for name in settings.recipes}
    for seed in settings.trainings:
        answers: dict = {}
        for name in settings.recipes:
            where = folder / f"{slug(name)}-{seed}-{settings.training_steps}"
            if not (where / "unet").is_dir():
                setup = setup or prepare(teacher, study)
                unet, _ = follow(setup, setup.train, RECIPES[name], seed, study, answers)
                save_student(unet, where, recipe=name, seed=seed)
            students[name].append(load_student(where, teacher))
    return students


def _table(teacher, settings: Settings, context: Context) -> dict:
    students = trained(teacher, settings, context.folder / "students")
    steps = settings.table_steps
    goal = scored(teacher, settings, steps)
    shipped = scored(pipelines(teacher)[SHIPPED], settings, steps, goal)
    tables = {"teacher": plain(goal.table), SHIPPED: plain(shipped.table)}
    every = {
        name: [scored(one, settings, steps, goal) for one in group]
        for name, group in students.items()
    }
    compared = {f"{SHIPPED} - teacher": plain(compare(shipped, goal))}
    first = settings.recipes[0]
    for name, found in every.items():
        for seed, one in zip(settings.trainings, found, strict=True):
            tables[f"{name}, {seed}"] = plain(one.table)
        compared[f"{name} - teacher"] = plain(compare(found[0], goal))
        if name != first:
            compared[f"{first} - {name}"] = plain(compare(every[first][0], found[0]))
    spreads = {name: plain(retraining(found)) for name, found in every.items()}
    return {"tables": tables, "compared": compared, "retraining": spreads}


def _stage(measure, name: str, context: Context) -> list[Path]:
    settings = Settings(**context.settings)
    values = measure(load_teacher("mini"), settings, context)
    notes = dataclasses.asdict(settings)
    return [ledger.write(f"evaluation_{name}", values, context.results, **notes)]


def _few_steps(context: Context) -> list[Path]:
    settings = few_steps.Settings(**context.settings)
    rows, times, images = few_steps.study(load_teacher("mini"), settings, context.folder)
    notes, values = dataclasses.asdict(settings), {"rows": rows, "times": times}
    path = ledger.write("evaluation_few_steps", values, context.results, **notes)
    sheet = path.with_suffix(".png")
    Image.fromarray(images).save(sheet)
    return [path, sheet]


STAGES = {
    name: Stage(functools.partial(_stage, measure, name), text, (f"evaluation_{name}.json",))
    for name, measure, text in (
        ("timing", _timing, "seconds of images and of calls; wants a quiet machine"),
        ("steps", _steps, "how few steps do, and the headline; needs the timing"),
        ("table", _table, "students after equal steps, and the shipped one"),
    )
} | {
    "few-steps": Stage(
        _few_steps,
        "the shipped student distilled to few steps; wants a quiet machine for its times",
        ("evaluation_few_steps.json", "evaluation_few_steps.png"),
    )
}
