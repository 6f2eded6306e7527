"""What the studies share: the images everything is measured with, scores, paired comparison."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline

from kdc import pipelines
from kdc.data import worlds
from kdc.data.datasets import load_dataset
from kdc.data.latents import LatentDataset, cache_latents
from kdc.evaluation import metrics
from kdc.evaluation.statistics import student_interval
from studies.common.renderings import balanced_prompts, renderings_of

MEASURES = {
    "output_error": "lower",
    "accuracy": "higher",
    "unseen": "higher",
    "fd": "lower",
}


@dataclass(frozen=True)
class Extent:
    """How many images are encoded and drawn. The defaults are those of the budget `standard`."""

    images: int = 1600  # to train on
    test_images: int = 192
    copies: int = 1  # of each combination of attributes, drawn to be judged
    thinned: int = 1  # draw but one in so many of these combinations, drawn by lot once for all
    unseen_copies: int = 0  # of each combination that no training image shows
    sampling_steps: int = 10


@dataclass
class Setup:
    """What every plan is trained on and measured with: the same for all of them."""

    teacher: StableDiffusionPipeline
    train: LatentDataset
    test: LatentDataset
    extent: Extent
    asked: list[worlds.Attributes]  # empty where the data set's attributes are unknown
    unseen: list[worlds.Attributes]  # combinations that no training image shows
    reference: torch.Tensor | None  # features of real renderings of what is asked

    @property
    def inputs(self) -> dict[str, int]:
        """Size of latents and length of captions, as `count_costs` takes them."""
        return {
            "size": self.train.mean.shape[-1],
            "sequence_length": self.train.embeddings.shape[1],
        }


def prepare(
    teacher: StableDiffusionPipeline, extent: Extent, dataset: str | Path = "worlds"
) -> Setup:
    """Encode the images. Only "worlds" has attributes to be judged by; else they are left out."""
    size = teacher.unet.config.sample_size * teacher.vae_scale_factor
    train, test = (
        cache_latents(teacher, load_dataset(dataset, split, size, count=count))
        for split, count in (("train", extent.images), ("test", extent.test_images))
    )
    known = dataset == "worlds"
    asked = balanced_prompts(extent.copies, held_out=False) if known else []
    if extent.thinned > 1:  # else the order stays, by which images and noise belong together
        asked = sorted(random.Random(0).sample(asked, len(asked) // extent.thinned))
    unseen = balanced_prompts(extent.unseen_copies, held_out=True) if known else []
    reference = metrics.clip_features(renderings_of(asked, seed=3)) if asked else None
    return Setup(teacher, train, test, extent, asked, unseen, reference)


def score(setup: Setup, pipeline: StableDiffusionPipeline, seed: int) -> dict:
    """Scores of what a pipeline draws with one seed; empty where the attributes are not known.

    `accuracy` is the share of images that show the asked-for colour, kind and background all at
    once, each of which has a column too; `unseen` is the same for combinations that no training
    image shows; `fd` is the distance to real renderings in the features of the embedded
    CLIP.
    """
    if not setup.asked:
        return {}
    every = setup.asked + setup.unseen
    images = pipelines.generate(
        pipeline,
        [worlds.caption(one) for one in every],
        seed=seed,
        steps=setup.extent.sampling_steps,
    )
    usual, rare = images[: len(setup.asked)], images[len(setup.asked) :]
    shares = metrics.attribute_accuracy(usual, setup.asked)
    scores = {"accuracy": shares.pop("all"), **shares}
    scores["fd"] = metrics.frechet_distance(metrics.clip_features(usual), setup.reference)
    if setup.unseen:
        scores["unseen"] = metrics.attribute_accuracy(rare, setup.unseen)["all"]
    return scores


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", name.lower())


def compare(
    rows: pd.DataFrame,
    candidate: str,
    baseline: str,
    confidence: float = 0.95,
    measures: Mapping[str, str] = MEASURES,
) -> pd.DataFrame:
    """Differences candidate - baseline, paired by seed: `mean`, the ends of Student's interval, `n`.

    `verdict` is "better", "worse" or, where the interval holds 0 or there is one seed, "open".
    """
    table = {}
    for measure, aim in measures.items():
        if measure not in rows:
            continue
        wide = rows.pivot(index="seed", columns="candidate", values=measure)
        difference = (wide[candidate] - wide[baseline]).dropna()
        low, high = student_interval(difference, confidence)
        good = high < 0 if aim == "lower" else low > 0
        bad = low > 0 if aim == "lower" else high < 0
        verdict = "better" if good else "worse" if bad else "open"
        table[measure] = {"mean": difference.mean(), "low": low, "high": high}
        table[measure] |= {"n": len(difference), "verdict": verdict}
    return pd.DataFrame(table).T


def strip(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], steps: int, seed: int = 0
) -> np.ndarray:
    """What a pipeline draws for prompts from one seed, side by side: (H, N W, 3) uint8."""
    images = pipelines.generate(pipeline, list(prompts), seed=seed, steps=steps)
    return np.concatenate(images.permute(0, 2, 3, 1).numpy(), axis=1)


def cut(sheet: np.ndarray, names: Sequence[str], columns: int) -> dict[str, list[np.ndarray]]:
    """The images (3, H, W) of strips that lie one below the other, one for each name."""
    strips = np.split(sheet.transpose(2, 0, 1), len(names), axis=1)
    return {n: np.split(one, columns, axis=2) for n, one in zip(names, strips, strict=True)}
