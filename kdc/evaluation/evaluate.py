"""Scores of a pipeline's images, with spread, count, extractor and real-against-real floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.data import Dataset

from kdc.data import worlds
from kdc.data.datasets import load_dataset
from kdc.evaluation import metrics
from kdc.evaluation.extractors import Extractor, find_extractor
from kdc.evaluation.perceptual import find_perceptual
from kdc.evaluation.statistics import SET_MEASURES, real_vs_real, student_interval
from kdc.io import fingerprint
from kdc.pipelines import generate

DIRECTIONS = {
    "accuracy": "higher",
    "clip": "higher",
    "fd": "lower",
    "kid": "lower",
    "precision": "higher",
    "recall": "higher",
    "lpips_to_teacher": "lower",
    "diversity": "higher",
}
_REFERENCES: dict[tuple[str, str], Tensor] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What `evaluate` found.

    `table` has a row for each metric: value (the mean over seeds), spread (their deviation), low
    and high (Student's 95 % interval over seeds), samples (images a seed), floor and floor_spread
    (real against real, at that count), extractor, checksum, seeds, note. `by_seed` are the values
    behind it. The rest serves `compare`: `features` (S, N, d), `per_image` {metric: (S, N)},
    `images` (S, N, 3, H, W), the features of the `reference` (M, d), and `generated_with`, what two
    evaluations must share to be compared.
    """

    table: pd.DataFrame
    by_seed: dict[str, list[float]]
    features: Tensor
    per_image: dict[str, Tensor]
    images: Tensor
    reference: Tensor | None
    generated_with: dict


def evaluate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    reference: Tensor | Dataset | str | Path | None = None,
    *,
    asked: Sequence[worlds.Attributes] = (),
    teacher: StableDiffusionPipeline | Scores | None = None,
    scores: Sequence[str] = (),
    extractor: str = "mini-clip",
    perceptual: str = "mini-lpips",
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 25,
    guidance: float = 7.5,
    batch_size: int = 32,
    baseline_draws: int = 10,
) -> Scores:
    """Draw every prompt with every seed, and score the images.

    `reference` are real images: uint8 (M, 3, H, W), a data set of `load_dataset`, a folder or a
    world's name. FID, KID, precision and recall compare N drawn with N of them (or all, if there
    are fewer), the floor real with real at the same count. `asked` are the attributes of the
    prompts, for the accuracy on the worlds. `teacher` draws the same prompts from the same noise,
    or is what an earlier `evaluate` found of it: `lpips_to_teacher` is the paired distance.
    `diversity` is the perceptual distance of images of one prompt from two seeds; two seeds make
    one pair, which has no spread.

    `scores` are names of `DIRECTIONS`; empty, all for which there is what they need. Before
    anything is drawn, `ValueError` is raised for a score that was asked for by name and cannot be
    computed (where it was not, its row says why and has no value), for unknown names, for images
    that are not uint8 or of another size, for attributes that are not one a prompt, and for a
    teacher that was evaluated with other prompts, seeds or settings; `RuntimeError` for a network
    in training mode or an extractor that cannot be loaded.
    """
    prompts, seeds = list(prompts), [int(seed) for seed in seeds]
    if not prompts or not seeds:
        raise ValueError("give at least one prompt and one seed")
    if unknown := set(scores) - set(DIRECTIONS):
        raise ValueError(f"unknown scores {sorted(unknown)}; they are {', '.join(DIRECTIONS)}")
    if asked and len(asked) != len(prompts):
        raise ValueError(f"{len(asked)} attributes for {len(prompts)} prompts")
    how = {"steps": steps, "guidance": guidance, "batch_size": batch_size}
    generated_with = how | {"prompts": prompts, "seeds": seeds}
    refuse_training(pipeline, "pipeline")
    if isinstance(teacher, Scores):
        check_alike(generated_with, teacher.generated_with)
    elif teacher is not None:
        refuse_training(teacher, "teacher")
    see = find_extractor(extractor)
    real = _features_of(reference, see, pipeline) if reference is not None else None
    refused = _refusals(len(prompts), seeds, see, real, asked, teacher)
    wanted = [name for name in DIRECTIONS if not scores or name in scores]
    if impossible := {name: refused[name] for name in scores if name in refused}:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in impossible.items()))
    possible, distance = [name for name in wanted if name not in refused], None
    if {"lpips_to_teacher", "diversity"} & set(possible):
        distance = find_perceptual(perceptual)
    images = _generated(pipeline, prompts, seeds, how)
    features = torch.stack([see(batch) for batch in images])

    per_image: dict[str, Tensor] = {}
    by_seed: dict[str, list[float]] = {}
    if "accuracy" in possible:
        right = [metrics.shown_attributes(batch, asked)["all"] for batch in images]
        per_image["accuracy"] = torch.stack(right).float()
    if "clip" in possible:
        with torch.inference_mode():
            text = see.read(prompts).float().cpu()
        per_image["clip"] = 100 * F.cosine_similarity(features, text[None], dim=-1)
    if "lpips_to_teacher" in possible:
        known = isinstance(teacher, Scores)
        theirs = teacher.images if known else _generated(teacher, prompts, seeds, how)
        pairs = zip(images, theirs, strict=True)
        per_image["lpips_to_teacher"] = torch.stack([distance(a, b) for a, b in pairs])
    if "diversity" in possible:
        pairs = list(zip(images, images.roll(1, dims=0), strict=True))
        pairs = pairs[:1] if len(seeds) == 2 else pairs  # the second would be the first again
        per_image["diversity"] = torch.stack([distance(a, b) for a, b in pairs])
    for name, values in per_image.items():
        by_seed[name] = values.mean(dim=1).tolist()
    chosen = _same_count(real, len(prompts)) if real is not None else None
    for name in SET_MEASURES:
        if name in possible:
            by_seed[name] = [SET_MEASURES[name](f, chosen) for f in features]

    rows = {}
    for name in wanted:
        judge = distance if name in ("lpips_to_teacher", "diversity") else see
        values = by_seed.get(name, [float("nan")])
        low, high = student_interval(values)
        at_baseline = (float("nan"), float("nan"))
        if name in SET_MEASURES and name in by_seed:
            at_baseline = real_vs_real(SET_MEASURES[name], real, len(prompts), baseline_draws)
        rows[name] = {
            "value": float(np.mean(values)),
            "spread": float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"),
            "low": low,
            "high": high,
            "samples": len(prompts),
            "real_vs_real": at_baseline[0],
            "real_vs_real_spread": at_baseline[1],
            "extractor": "mini-classifier" if name == "accuracy" else getattr(judge, "name", "-"),
            "checksum": _checksum(name, judge),
            "seeds": ", ".join(map(str, seeds)),
            "note": refused.get(name) or _note(name, len(prompts), seeds, real),
        }
    generated_with |= {"extractor": extractor, "perceptual": perceptual, "asked": list(asked)}
    table = pd.DataFrame(rows).T.rename_axis("score")
    numbers = ["value", "spread", "low", "high", "real_vs_real", "real_vs_real_spread"]
    table[numbers] = table[numbers].astype(float)
    return Scores(table, by_seed, features, per_image, images, chosen, generated_with)


def check_alike(ours: dict, theirs: dict) -> None:
    """Raise `ValueError` where two evaluations differ in what `ours`, a `generated_with`, names."""
    for name, value in ours.items():
        if value != theirs[name]:
            raise ValueError(f"the evaluations differ in {name}: they cannot be compared")


def _generated(pipeline, prompts, seeds, how: dict) -> Tensor:
    return torch.stack([generate(pipeline, prompts, seed=seed, **how) for seed in seeds])


def refuse_training(pipeline: StableDiffusionPipeline, name: str = "pipeline") -> None:
    """Raise `RuntimeError` where a network of the pipeline is in training mode."""
    for part in ("unet", "vae", "text_encoder"):
        if getattr(pipeline, part).training:
            raise RuntimeError(f"{name}.{part} is in training mode: call .eval() on it")


def _refusals(count, seeds, see: Extractor, real, asked, teacher) -> dict[str, str]:
    """Why a score cannot be computed, by score."""
    refused = {}
    fewest = count if real is None else min(count, len(real))
    needed = {"fd": 2 * see.width, "kid": 2, "precision": 5, "recall": 5}
    for name, least in needed.items():
        if real is None:
            refused[name] = "there are no reference images"
        elif fewest < least:
            refused[name] = f"{fewest} images, {least} needed for {see.width} dimensions"
    if not asked:
        refused["accuracy"] = "the attributes of the prompts are not known"
    if see.read is None:
        refused["clip"] = f"the extractor {see.name} reads no texts"
    if teacher is None:
        refused["lpips_to_teacher"] = "there is no teacher"
    if len(seeds) < 2:
        refused["diversity"] = "it needs two seeds"
    return refused


def _note(name: str, count: int, seeds: Sequence[int], real: Tensor | None) -> str:
    """Warnings that travel with a number."""
    notes = []
    if len(seeds) < 3:
        notes.append(f"{len(seeds)} seed(s): the spread is not known well")
    if name in SET_MEASURES and real is not None:
        if len(real) < 2 * count:
            notes.append(f"no floor: {len(real)} reference images, {2 * count} needed")
        if len(real) < count:
            notes.append(f"compared with {len(real)} only")
    return "; ".join(notes)


def _features_of(reference, see: Extractor, pipeline) -> Tensor:
    """Features of reference images, computed once for images of that content."""
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if isinstance(reference, str | Path):
        reference = load_dataset(reference, "test", size)
    if not isinstance(reference, Tensor):
        signed = torch.stack([reference[i]["image"] for i in range(len(reference))])
        reference = metrics.as_bytes(signed)
    metrics.check_images(reference)
    if reference.shape[-2:] != (size, size):
        raise ValueError(
            f"reference images are {tuple(reference.shape[-2:])}, the pipeline draws {size} x "
            f"{size}: resizing would be part of the score, so do it yourself, the same for both"
        )
    key = fingerprint(reference), see.checksum
    if key not in _REFERENCES:
        _REFERENCES[key] = see(reference)
    return _REFERENCES[key]


def _same_count(real: Tensor, count: int) -> Tensor:
    """As many rows of the reference as there are images of one seed, always the same ones."""
    rows = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    return real[rows[:count]]


def _checksum(name: str, judge) -> str:
    if name == "accuracy":
        return fingerprint(*metrics.attribute_classifier().state_dict().values())
    return getattr(judge, "checksum", "-")
