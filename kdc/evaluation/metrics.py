"""The metrics: one table, `METRICS`, that everything which scores images iterates over.

A new metric is one more entry; `kdc.evaluate`, comparisons, sequences, studies and grades follow.
What is known of a set of generated images is an `Evidence`; `score` computes from it what it can,
and says why it cannot compute the rest.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from kdc.data import worlds
from kdc.data.latents import LatentDataset
from kdc.data.scenes import Scene
from kdc.distillation.fidelity import output_error
from kdc.evaluation import judges, scene_judge
from kdc.evaluation.extractors import Extractor, Perceptual
from kdc.evaluation.species import SpeciesJudge

NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 1904.06991)
BALLS = 5  # neighbours of density and coverage, as published
PUBLISHED = "inception-v3"  # with these features a Fréchet distance is the FID


class Identity(nn.Module):
    """Lets torchmetrics take features instead of images."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two sets of features (N, d) and (M, d), each fitted by a Gaussian.

    Raises `ValueError` below two samples a dimension, where the covariance is not determined.
    """
    width = features.shape[1]
    fewest = min(len(features), len(reference))
    if fewest < 2 * width:
        raise ValueError(f"{fewest} samples for {width} dimensions: at least {2 * width} needed")
    metric = FrechetInceptionDistance(feature=Identity(width), normalize=False)
    metric.set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return metric.compute().item()


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """KID (Bińkowski et al. 1801.01401): the unbiased squared MMD with a cubic kernel.

    features (N, d), reference (M, d); of the larger set the first min(N, M). It may be negative.
    Raises `ValueError` below two samples.
    """
    count = min(len(features), len(reference))
    if count < 2:
        raise ValueError(f"{count} samples: KID needs at least 2")
    with warnings.catch_warnings(action="ignore"):  # that it keeps all features
        metric = KernelInceptionDistance(
            feature=Identity(features.shape[1]), subsets=1, subset_size=count
        )
    metric.set_dtype(torch.float64)
    metric.update(reference[:count].double(), real=True)
    metric.update(features[:count].double(), real=False)
    with torch.random.fork_rng(devices=[]):  # it shuffles
        return metric.compute()[0].item()


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Precision and recall of manifolds of `NEIGHBOURS` neighbours (1904.06991).

    Precision: the share of features (N, d) that lie among the reference (M, d); recall: the share
    of the reference that lies among the features. Raises `ValueError` for too few samples.
    """
    fewest = min(len(features), len(reference))
    if fewest <= NEIGHBOURS + 1:
        raise ValueError(f"{fewest} samples: precision and recall need more than {NEIGHBOURS + 1}")
    found = prc_features_to_metric(
        features.double(), reference.double(), prc_neighborhood=NEIGHBOURS, verbose=False
    )
    return found["precision"], found["recall"]


def density_coverage(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Density and coverage with `BALLS` neighbours (Naeem et al. 2002.09797, equations 4 and 5).

    Around each of the reference (M, d) lies a ball that reaches to its `BALLS`-th nearest neighbour
    among the reference. Density: how many balls a feature of (N, d) lies in on average, over
    `BALLS`; it may exceed 1. Coverage: the share of balls that hold a feature. Raises `ValueError`
    for too few samples.
    """
    fewest = min(len(features), len(reference))
    if fewest <= BALLS + 1:
        raise ValueError(f"{fewest} samples: density and coverage need more than {BALLS + 1}")
    real, ours = reference.double(), features.double()
    among = torch.cdist(real, real, compute_mode="donot_use_mm_for_euclid_dist")
    radius = among.kthvalue(BALLS + 1, dim=1).values  # itself, at 0, is the first
    inside = torch.cdist(real, ours, compute_mode="donot_use_mm_for_euclid_dist") < radius[:, None]
    density = inside.double().sum(dim=0).mean().item() / BALLS
    return density, inside.any(dim=1).double().mean().item()


def clip_score(features: Tensor, text_features: Tensor) -> Tensor:
    """100 times the cosine of image (N, d) and caption (N, d) in one space, (N,)."""
    return 100 * F.cosine_similarity(features, text_features, dim=-1)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of a set of generated images; metrics read what they need."""

    # The images, uint8 (N, 3, H, W).
    images: Tensor
    # What computes features, and perceptual distances where a metric asks for them.
    extractor: Extractor | None = None
    perceptual: Perceptual | None = None
    # What each image was asked to show: its prompt, and its attributes on the procedural worlds.
    prompts: Sequence[str] = ()
    attributes: Sequence[worlds.Attributes] = ()
    # Or the scene of one to three objects that each was asked to show.
    scenes: Sequence[Scene] = ()
    # The species that each was asked to show, of those that the judge knows.
    species: Sequence[str] = ()
    species_judge: SpeciesJudge | None = None
    # Features (M, d) of real images.
    reference: Tensor | None = None
    # The teacher's images of the same prompts from the same noise, and ours from another seed.
    teacher_images: Tensor | None = None
    other_images: Tensor | None = None
    # Held-back latents, and the pipelines whose predictions on them are compared.
    latents: LatentDataset | None = None
    pipeline: StableDiffusionPipeline | None = None
    teacher: StableDiffusionPipeline | None = None

    @functools.cached_property
    def features(self) -> Tensor:
        """Features (N, d) of the images, computed once."""
        return self.extractor(self.images)

    @functools.cached_property
    def shown(self) -> dict[str, Tensor]:
        """Whether each image shows the asked-for attributes, and "all" of them: (N,) bool."""
        return judges.shown_attributes(self.images, self.attributes)

    @functools.cached_property
    def scenes_shown(self) -> dict[str, Tensor]:
        """What of its scene each image shows, see `scene_judge.shown_scenes`: (N,) bool."""
        return scene_judge.shown_scenes(self.images, self.scenes)

    @property
    def has(self) -> set[str]:
        """Which needs of metrics it meets."""
        met = {
            "features": self.extractor is not None,
            "reference": self.extractor is not None and self.reference is not None,
            "prompts": self.extractor is not None and bool(self.extractor.read and self.prompts),
            "attributes": len(self.attributes) > 0,
            "scenes": len(self.scenes) > 0,
            "species": self.species_judge is not None and len(self.species) > 0,
            "pairs": self.teacher_images is not None,
            "seeds": self.other_images is not None,
            "latents": None not in (self.latents, self.pipeline, self.teacher),
        }
        return {name for name, there in met.items() if there}


# Why a score cannot be had, by what is missing.
MISSING: Mapping[str, str] = {
    "features": "no extractor computes features",
    "reference": "there are no reference images",
    "prompts": "the extractor reads no texts",
    "attributes": "the attributes of the prompts are not known",
    "scenes": "the scenes that the prompts ask for are not known",
    "species": "no judge of species was fitted, or the prompts' species are not known",
    "pairs": "there is no teacher",
    "seeds": "it needs two seeds",
    "latents": "there are no held-back latents and teacher",
}


@dataclass(frozen=True)
class Metric:
    """One entry of `METRICS`."""

    # A value for each image (N,), or one for the set.
    function: Callable[[Evidence], Tensor | float]
    # Whether a higher value is better.
    higher_is_better: bool
    # What it needs, of the keys of `MISSING`.
    needs: frozenset[str] = field(default_factory=frozenset)
    # Whether `function` gives a value for each image.
    per_image: bool = False
    # The fewest images, and reference images, that determine it, from the width of the features.
    fewest: Callable[[int], int] = lambda width: 1
    # Where it compares two sets of features: that comparison, (N, d) and (M, d) to a number.
    measure: Callable[[Tensor, Tensor], float] | None = None

    @property
    def of_sets(self) -> bool:
        """Whether it compares sets of images, so that real ones have a score as well."""
        return self.measure is not None


def _of_sets(
    measure: Callable[[Tensor, Tensor], float], higher_is_better: bool, fewest: Callable[[int], int]
) -> Metric:
    def function(evidence: Evidence) -> float:
        return measure(evidence.features, evidence.reference)

    needs = frozenset({"features", "reference"})
    return Metric(function, higher_is_better, needs, fewest=fewest, measure=measure)


def _shows(what: str, need: str = "attributes") -> Metric:
    def function(evidence: Evidence) -> Tensor:
        shown = evidence.shown if need == "attributes" else evidence.scenes_shown
        return shown[what].float()

    return Metric(function, True, frozenset({need}), per_image=True)


def _species(evidence: Evidence) -> Tensor:
    return evidence.species_judge.right(evidence.images, evidence.species).float()


def _clip(evidence: Evidence) -> Tensor:
    with torch.inference_mode():
        text = evidence.extractor.read(list(evidence.prompts)).float().cpu()
    return clip_score(evidence.features, text)


def _to_teacher(evidence: Evidence) -> Tensor:
    return evidence.perceptual(evidence.images, evidence.teacher_images)


def _diversity(evidence: Evidence) -> Tensor:
    return evidence.perceptual(evidence.images, evidence.other_images)


def _output_error(evidence: Evidence) -> float:
    return output_error(evidence.pipeline.unet, evidence.teacher, evidence.latents).mean()


def precision(features: Tensor, reference: Tensor) -> float:
    """The first of `precision_recall`."""
    return precision_recall(features, reference)[0]


def density(features: Tensor, reference: Tensor) -> float:
    """The first of `density_coverage`."""
    return density_coverage(features, reference)[0]


def coverage(features: Tensor, reference: Tensor) -> float:
    """The second of `density_coverage`."""
    return density_coverage(features, reference)[1]


def recall(features: Tensor, reference: Tensor) -> float:
    """The second of `precision_recall`."""
    return precision_recall(features, reference)[1]


METRICS: dict[str, Metric] = {
    "accuracy": _shows("all"),
    "colour": _shows("colour"),
    "kind": _shows("kind"),
    "background": _shows("background"),
    "binding": _shows("binding", "scenes"),
    "count": _shows("count", "scenes"),
    "place": _shows("place", "scenes"),
    "species": Metric(_species, True, frozenset({"species"}), per_image=True),
    "clip": Metric(_clip, True, frozenset({"features", "prompts"}), per_image=True),
    "fd": _of_sets(frechet_distance, False, lambda width: 2 * width),
    "kid": _of_sets(kernel_distance, False, lambda width: 2),
    "precision": _of_sets(precision, True, lambda width: NEIGHBOURS + 2),
    "recall": _of_sets(recall, True, lambda width: NEIGHBOURS + 2),
    "density": _of_sets(density, True, lambda width: BALLS + 2),
    "coverage": _of_sets(coverage, True, lambda width: BALLS + 2),
    "lpips_to_teacher": Metric(_to_teacher, False, frozenset({"pairs"}), per_image=True),
    "diversity": Metric(_diversity, True, frozenset({"seeds"}), per_image=True),
    "output_error": Metric(_output_error, False, frozenset({"latents"})),
}


def label(name: str, extractor: str | None) -> str:
    """What a metric is called with that extractor: a Fréchet distance is an FID only with the
    published Inception-v3 features."""
    return "fid" if name == "fd" and extractor == PUBLISHED else name


def metric_of(name: str) -> Metric:
    """The metric behind a name or a label. Raises `ValueError` naming the known ones."""
    name = "fd" if name == "fid" else name
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; the metrics are {', '.join(METRICS)}")
    return METRICS[name]


def refusals(
    has: set[str], count: int, width: int | None = None, reference: int | None = None
) -> dict[str, str]:
    """Why each metric that cannot be computed cannot: what is missing, or too few images.

    `has` are the needs that are met, `count` the images, `width` that of the features and
    `reference` the number of reference images.
    """
    refused = {}
    for name, metric in METRICS.items():
        missing = [need for need in MISSING if need in metric.needs - has]
        fewest = count if reference is None or not metric.of_sets else min(count, reference)
        needed = metric.fewest(width or 1)
        if missing:
            refused[name] = MISSING[missing[-1]]
        elif fewest < needed:
            refused[name] = f"{fewest} images, {needed} needed for {width} dimensions"
    return refused


def refuse_named(wanted: Sequence[str], refused: Mapping[str, str]) -> None:
    """Raise `ValueError` for metrics asked for by name that are unknown or cannot be computed."""
    for name in wanted:
        metric_of(name)
    impossible = {name: refused[name] for name in wanted if name in refused}
    if impossible:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in impossible.items()))


def score(
    evidence: Evidence, wanted: Sequence[str] = (), *, strict: bool = True
) -> tuple[dict[str, Tensor | float], dict[str, str]]:
    """Values of the metrics by name, for each image or one for the set; and why others are missing.

    `wanted` are names of `METRICS`; empty, all for which there is what they need. Raises
    `ValueError` for a metric that was asked for by name and cannot be computed; not `strict`, it is
    left out like any other.
    """
    width = evidence.extractor.width if evidence.extractor is not None else None
    reference = None if evidence.reference is None else len(evidence.reference)
    refused = refusals(evidence.has, len(evidence.images), width, reference)
    refuse_named(wanted, refused if strict else {})
    values = {
        name: metric.function(evidence)
        for name, metric in METRICS.items()
        if name not in refused and (not wanted or name in wanted)
    }
    return values, {name: why for name, why in refused.items() if not wanted or name in wanted}


def means(values: Mapping[str, Any]) -> dict[str, float]:
    """One number for each metric of `score`: the mean over images where there is one for each."""
    return {
        name: value.mean().item() if isinstance(value, Tensor) else float(value)
        for name, value in values.items()
    }
