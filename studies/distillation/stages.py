"""The stages of chapter 03's study, and of appendix A3's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from kdc import pipelines
from kdc.io import make_once, write_image
from studies.common import ledger
from studies.common.protocol import Setup, prepare, score, slug, strip
from studies.common.recipes import AUTHORS, RECIPES, Recipe
from studies.common.runner import Context, Stage
from studies.distillation.study import (
    AUTHORS_LOG,
    SHOWN,
    Settings,
    authors_ratio,
    fixed_of,
    study,
)


def _setup(context: Context) -> tuple[Setup, Settings]:
    settings = Settings(**context.settings)
    return prepare(pipelines.load_teacher("mini"), settings), settings


def _followed(context: Context, recipes: Mapping[str, Recipe]) -> tuple[Setup, Settings, dict]:
    """The recipes' rows and logs, and beside them the teacher's own scores by seed."""
    setup, settings = _setup(context)
    rows, logs = study(setup, settings, context.folder, recipes)
    goal = []
    for seed in settings.seeds:
        file, made_with = context.folder / f"teacher-{seed}.json", fixed_of(setup, settings)
        found = make_once(file, made_with, functools.partial(score, setup, setup.teacher, seed))
        goal.append({"seed": seed} | found)
    return setup, settings, {"rows": rows.to_dict("records"), "logs": logs, "teacher": goal}


def _recipes(context: Context) -> list[Path]:
    """Beside the rows, a strip of images for the teacher and then for each recipe."""
    setup, settings, values = _followed(context, RECIPES)
    path = ledger.write("distillation", values, context.results, **vars(settings))
    first = [context.folder / f"{slug(name)}-{settings.seeds[0]}.png" for name in RECIPES]
    strips = [
        strip(setup.teacher, SHOWN, settings.sampling_steps),
        *(np.asarray(Image.open(file)) for file in first),
    ]
    write_image(path.with_suffix(".png"), Image.fromarray(np.concatenate(strips)))
    return [path]


def _authors(context: Context) -> list[Path]:
    compared = {"corrected": RECIPES["corrected"]} | AUTHORS
    _, settings, values = _followed(context, compared)
    return [ledger.write("authors", values, context.results, **vars(settings))]


def _authors_ratio(context: Context) -> list[Path]:
    setup, _ = _setup(context)
    rows = authors_ratio(setup)
    pixels = setup.train.mean.shape[-2] * setup.train.mean.shape[-1]
    values = {"rows": rows.to_dict("records"), "pixels": pixels, "theirs": AUTHORS_LOG}
    return [ledger.write("authors_ratio", values, context.results)]


def stored_ratio(results: str | Path | None = None) -> tuple[pd.DataFrame, dict]:
    """What the stage `authors-ratio` measured: a row a seed; and `pixels` and `theirs`."""
    values = ledger.read("authors_ratio", results)
    return pd.DataFrame(values.pop("rows")), values


STAGES = {
    "recipes": Stage(
        _recipes,
        "every recipe after equal steps on equal data, over seeds",
        ("distillation.json", "distillation.png"),
    ),
    "authors": Stage(
        _authors,
        "as in the authors' code, both configurations, beside the corrected loss",
        ("authors.json",),
    ),
    "authors-ratio": Stage(
        _authors_ratio,
        "features over softened KL as in the authors' code, on the mini teacher",
        ("authors_ratio.json",),
    ),
}
