"""Recipes: everything that may differ between two ways of distilling a student, as a table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from kdc.data import worlds
from kdc.data.latents import LatentDataset, latents_of_captions, with_captions
from kdc.distillation.losses import TERMS, LossWeights

DATA_SEED = 777  # of the images that the teacher makes, and of swapped captions
DATA = ("real", "teacher-made", "swapped captions")


def changed(**training: Any) -> tuple[tuple[str, Any], ...]:
    """Fields of `TrainSettings` for a recipe, in a form that can be compared and hashed."""
    return tuple(training.items())


# What the authors' training script is called with, and AdamW's settings that it leaves at its
# defaults. Their EMA option is inverted, so that asking for it switches it off.
AUTHORS_TRAINING = changed(
    batch_size=1,
    accumulation=4,
    learning_rate=5e-5,
    warmup=0,
    schedule="constant",
    betas=(0.9, 0.999),
    weight_decay=0.01,
    caption_dropout=0.0,
    ema_decay=0.0,
)


@dataclass(frozen=True)
class Recipe:
    """How one student is made."""

    # The loss.
    weights: LossWeights = LossWeights()
    # Which plan cuts it, and where its first weights come from: see `kdc.slim`.
    plan: str = "kdc"
    init: str = "copy"
    # What it is trained on, one of `DATA`.
    data: str = "real"
    # Fields of `TrainSettings` in which it differs from the study's: see `changed`.
    training: tuple[tuple[str, Any], ...] = ()
    # Whether an image of the step before joins each batch, as in the authors' code.
    last_sample: bool = False

    def __post_init__(self):
        if self.data not in DATA:
            raise ValueError(f"unknown data {self.data!r}; it can be {', '.join(DATA)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, by which stored rows are known again."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"weights": self.weights.to_dict(), "training": dict(self.training)}


def _terms() -> dict[str, LossWeights]:
    """The losses of the main comparison: the task, one term more, all terms, the authors'."""
    first, *others = TERMS
    return {
        first: LossWeights.only(first),
        **{f"{first}, {name}": LossWeights.only(first, name) for name in others},
        "corrected": LossWeights(),
        "authors' terms, features averaged": _averaged(),
    }


def _averaged(**changes: Any) -> LossWeights:
    """The authors' terms with the features averaged over the blocks where their code sums them.

    Until the authors' code was read again this stood for it; the stored rows measured it.
    """
    return LossWeights.as_published().replace(feature_reduction="mean", **changes)


def _options() -> dict[str, Recipe]:
    """Changes of the corrected loss, one at a time, from copied weights."""
    change = LossWeights().replace
    first, *others = TERMS
    soft = {"soft": 0.1, "soft_reduction": "mean"}
    return {
        **{name: Recipe(LossWeights.only(name)) for name in others},
        "without task": Recipe(change(task=0.0)),
        "temperature 0.5": Recipe(change(temperature=0.5)),
        "temperature 8": Recipe(change(temperature=8.0)),
        "features at attentions": Recipe(change(features_at="attention")),
        "features at both": Recipe(change(features_at="both")),
        "raw features": Recipe(change(feature_normalised=False)),
        "no caption dropout": Recipe(training=changed(caption_dropout=0.0)),
        "teacher-made": Recipe(data="teacher-made"),
        "swapped captions": Recipe(change(task=0.0), data="swapped captions"),
        "features averaged, output corrected": Recipe(_averaged(output_gradient=True)),
        "features averaged, soft corrected": Recipe(_averaged(**soft)),
        "features averaged, both corrected": Recipe(_averaged(**soft, output_gradient=True)),
        "authors' newest terms": Recipe(
            LossWeights.as_published(newest=True), plan="kdc-v2", init="random"
        ),
    }


def _authors() -> dict[str, Recipe]:
    """As in the authors' code, both configurations: with their training, and with the study's."""
    first, newest = LossWeights.as_published(), LossWeights.as_published(newest=True)
    exact = {"training": AUTHORS_TRAINING, "last_sample": True}
    return {
        "as in the authors' code": Recipe(first, **exact),
        "as in the authors' code, newest": Recipe(newest, "kdc-v2", "random", **exact),
        "authors' terms": Recipe(first),
    }


RECIPES: dict[str, Recipe] = {
    **{name: Recipe(weights) for name, weights in _terms().items()},
    **{f"random start: {n}": Recipe(w, init="random") for n, w in _terms().items()},
    **_options(),
}
AUTHORS = _authors()  # studied by a stage of their own: their steps are four small batches
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
    made_images: int = 4,
    steps: int = 10,
) -> LatentDataset:
    """The training data of one kind of `DATA`.

    The teacher makes, and swapped captions are drawn from, all combinations of attributes, also
    those that no real training image shows: `made_images` images of each, in `steps` of sampling.
    """
    if kind == "real":
        return real
    captions = [worlds.caption(one) for one in every_combination()]
    if kind == "teacher-made":
        return latents_of_captions(pipeline, captions * made_images, DATA_SEED, steps=steps)
    generator = torch.Generator().manual_seed(DATA_SEED)
    drawn = torch.randint(len(captions), (len(real),), generator=generator).tolist()
    return with_captions(real, pipeline, [captions[i] for i in drawn])
