"""Recipes: everything that may differ between two ways of distilling a student, as a table."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline

from kdc.data import worlds
from kdc.data.latents import LatentDataset, latents_of_captions, with_captions
from kdc.distillation.losses import LossWeights

DATA_SEED = 777  # of the images that the teacher makes, and of swapped captions
DATA = ("real", "teacher-made", "swapped captions")


@dataclass(frozen=True)
class Recipe:
    """How one student is made. `data` is one of `DATA`, the other fields are those of `distill`."""

    weights: LossWeights = LossWeights()
    plan: str = "kdc"
    init: str = "copy"
    caption_dropout: float = 0.1
    data: str = "real"

    def __post_init__(self):
        if self.data not in DATA:
            raise ValueError(f"unknown data {self.data!r}; it can be {', '.join(DATA)}")


def _terms() -> dict[str, LossWeights]:
    """The losses of the main comparison: the task, one term more, all terms, authors' terms, features averaged."""
    return {
        "task": LossWeights.only("task"),
        "task, output": LossWeights.only("task", "output"),
        "task, soft": LossWeights.only("task", "soft"),
        "task, feature": LossWeights.only("task", "feature"),
        "corrected": LossWeights(),
        "authors' terms, features averaged": LossWeights.as_published(),
    }


def _options() -> dict[str, Recipe]:
    """Changes of the corrected loss, one at a time, from copied weights."""
    change = functools.partial(dataclasses.replace, LossWeights())
    published = functools.partial(dataclasses.replace, LossWeights.as_published())
    no_task = change(task=0.0)
    return {
        "output": Recipe(LossWeights.only("output")),
        "soft": Recipe(LossWeights.only("soft")),
        "feature": Recipe(LossWeights.only("feature")),
        "without task": Recipe(no_task),
        "temperature 0.5": Recipe(change(temperature=0.5)),
        "temperature 8": Recipe(change(temperature=8.0)),
        "features at attentions": Recipe(change(features_at="attention")),
        "features at both": Recipe(change(features_at="both")),
        "raw features": Recipe(change(feature_normalised=False)),
        "no caption dropout": Recipe(caption_dropout=0.0),
        "teacher-made": Recipe(data="teacher-made"),
        "swapped captions": Recipe(no_task, data="swapped captions"),
        "features averaged, output corrected": Recipe(published(output_gradient=True)),
        "features averaged, soft corrected": Recipe(published(soft=0.1, soft_reduction="mean")),
        "features averaged, both corrected": Recipe(
            published(output_gradient=True, soft=0.1, soft_reduction="mean")
        ),
        "authors' newest terms": Recipe(LossWeights.as_published(newest=True), "kdc-v2", "random"),
    }


RECIPES: dict[str, Recipe] = {
    **{name: Recipe(weights) for name, weights in _terms().items()},
    **{f"random start: {n}": Recipe(w, init="random") for n, w in _terms().items()},
    **_options(),
}


STUDENT_RECIPE = "features averaged, both corrected"  # of the shipped student


def every_combination() -> list[worlds.Attributes]:
    """All combinations of both worlds, those held out from training last."""
    kinds = ((world, held) for held in (False, True) for world in worlds.WORLDS.values())
    return [one for world, held in kinds for one in world.combinations(held)]


def images_of(
    kind: str,
    pipeline: StableDiffusionPipeline,
    real: LatentDataset,
    *,
    made: int = 4,
    steps: int = 10,
) -> LatentDataset:
    """The training data of one kind of `DATA`.

    The teacher makes, and swapped captions are drawn from, all combinations of attributes, also
    those that no real training image shows: `made` images of each, in `steps` of sampling.
    """
    if kind == "real":
        return real
    captions = [worlds.caption(one) for one in every_combination()]
    if kind == "teacher-made":
        return latents_of_captions(pipeline, captions * made, DATA_SEED, steps=steps)
    generator = torch.Generator().manual_seed(DATA_SEED)
    generated = torch.randint(len(captions), (len(real),), generator=generator).tolist()
    return with_captions(real, pipeline, [captions[i] for i in generated])
