"""What the studies share: the images everything is measured with, scores, paired comparison."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from scipy import stats

from kdc import pipelines
from kdc.data import worlds
from kdc.data.cache import cache_latents
from kdc.data.datasets import load_dataset
from kdc.data.latents import LatentDataset
from kdc.evaluation import metrics
from kdc.evaluation.extractors import find_extractor
from kdc.evaluation.metrics import Evidence, metric_of
from kdc.evaluation.statistics import student_interval, welch_interval
from studies.common.renderings import balanced_prompts, renderings_of

MEASURES = ("output_error", "accuracy", "unseen", "fd")


def higher_is_better(measure: str) -> bool:
    """Whether a higher value of a study's measure is better, from the metric behind it.

    Forgetting and leakage are better when lower, retention when higher, whatever the metric;
    "old_fd" and "new_fd" are as "fd", and "unseen" is an accuracy.
    """
    if measure.startswith(("forgetting", "leakage")):
        return False
    if measure.startswith("retention") or measure == "unseen":
        return True
    return metric_of(measure.removeprefix("old_").removeprefix("new_")).higher_is_better


@dataclass(frozen=True)
class Extent:
    """How many images are encoded and generated; by default, those of the budget `standard`."""

    images: int = 1600  # to train on
    test_images: int = 192
    copies: int = 1  # of each combination of attributes, generated to be scored
    thinned: int = 1  # generate one in so many of these combinations, chosen once for all
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
    see = find_extractor("mini-clip")
    reference = see(renderings_of(asked, seed=3)) if asked else None
    return Setup(teacher, train, test, extent, asked, unseen, reference)


def score(setup: Setup, pipeline: StableDiffusionPipeline, seed: int) -> dict:
    """Scores of what a pipeline generates with one seed; empty where no attributes are known.

    The accuracy and its parts, and the Fréchet distance to real renderings in the features of the
    embedded CLIP; `unseen` is the accuracy for combinations that no training image shows. What too
    few images could carry is left out.
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
    evidence = Evidence(
        images=usual,
        extractor=find_extractor("mini-clip"),
        attributes=setup.asked,
        reference=setup.reference,
    )
    wanted = ("accuracy", "colour", "kind", "background", "fd")
    scores = metrics.means(metrics.score(evidence, wanted, strict=False)[0])
    if setup.unseen:
        found, _ = metrics.score(Evidence(images=rare, attributes=setup.unseen), ("accuracy",))
        scores["unseen"] = metrics.means(found)["accuracy"]
    return scores


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", name.lower())


def compare_rows(
    rows: pd.DataFrame,
    candidate: str,
    baseline: str,
    measures: Iterable[str] = MEASURES,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Differences candidate - baseline by measure: `mean`, interval `low` to `high`, `p`, `n`.

    They are paired by seed, with Student's interval. Where the two share no seed, the difference is
    that of the means, with Welch's interval, and `n` counts both. `p` is that of the two-sided
    t-test of no difference, not corrected for the number of tests. `verdict` is "better", "worse"
    or, where the interval holds 0 or cannot be had, "open".
    """
    table = {}
    for measure in measures:
        if measure not in rows:
            continue
        wide = rows.pivot(index="seed", columns="candidate", values=measure)
        paired = (wide[candidate] - wide[baseline]).dropna()
        if len(paired):
            mean, n = paired.mean(), len(paired)
            low, high = student_interval(paired, confidence)
            tested = stats.ttest_1samp(paired, 0.0) if n > 1 else None
        else:
            ours, theirs = (wide[name].dropna() for name in (candidate, baseline))
            mean, n = ours.mean() - theirs.mean(), f"{len(ours)} + {len(theirs)}"
            low, high = welch_interval(ours, theirs, confidence)
            many = min(len(ours), len(theirs)) > 1
            tested = stats.ttest_ind(ours, theirs, equal_var=False) if many else None
        sign = 1 if higher_is_better(measure) else -1
        better, worse = min(sign * low, sign * high) > 0, max(sign * low, sign * high) < 0
        verdict = "better" if better else "worse" if worse else "open"
        p = float(tested.pvalue) if tested else float("nan")
        table[measure] = {"mean": mean, "low": low, "high": high, "p": p, "n": n}
        table[measure]["verdict"] = verdict
    return pd.DataFrame(table).T


def strip(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    steps: int,
    seed: int = 0,
    guidance: float = 7.5,
) -> np.ndarray:
    """What a pipeline generates for prompts from one seed, side by side: (H, N W, 3) uint8."""
    how = {"seed": seed, "steps": steps, "guidance": guidance}
    images = pipelines.generate(pipeline, list(prompts), **how)
    return np.concatenate(images.permute(0, 2, 3, 1).numpy(), axis=1)


def cut(sheet: np.ndarray, names: Sequence[str], columns: int) -> dict[str, list[np.ndarray]]:
    """The images (3, H, W) of strips that lie one below the other, one for each name."""
    strips = np.split(sheet.transpose(2, 0, 1), len(names), axis=1)
    return {n: np.split(one, columns, axis=2) for n, one in zip(names, strips, strict=True)}
