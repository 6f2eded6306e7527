"""Scores of a pipeline's images: spread, count, extractor and real-vs-real baseline beside each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.data import Dataset

from kdc.checks import as_seeds, as_texts, finite_number, whole_number
from kdc.data import worlds
from kdc.data.datasets import load_dataset
from kdc.data.latents import LatentDataset
from kdc.data.scenes import Scene
from kdc.evaluation import judges
from kdc.evaluation.extractors import Extractor, Perceptual, find_extractor, find_perceptual
from kdc.evaluation.images import as_bytes, check_images
from kdc.evaluation.metrics import (
    METRICS,
    Evidence,
    label,
    means,
    metric_of,
    refusals,
    refuse_named,
    score,
)
from kdc.evaluation.scene_judge import scene_judge
from kdc.evaluation.species import SpeciesJudge
from kdc.evaluation.statistics import real_vs_real, student_interval
from kdc.io import fingerprint
from kdc.pipelines import generate

_REFERENCES: dict[tuple[str, str], Tensor] = {}


@dataclass(frozen=True, eq=False)
class Scores:
    """What `evaluate` found; all but `table` and `by_seed` serves `compare`."""

    # A row for each metric: value (the mean over seeds), spread (their deviation), low and high
    # (Student's 95 % interval over seeds), samples (images a seed), real_vs_real and its spread (at
    # that count), extractor, checksum, seeds, note.
    table: pd.DataFrame
    # The values behind it.
    by_seed: dict[str, list[float]]
    # Features (S, N, d), values by metric (S, N), and images (S, N, 3, H, W), by seed.
    features: Tensor
    per_image: dict[str, Tensor]
    images: Tensor
    # Features of the reference (M, d).
    reference: Tensor | None
    # The settings that two evaluations share if they are to be compared.
    generated_with: dict


def evaluate(
    pipeline: StableDiffusionPipeline,
    prompts: str | Sequence[str],
    reference: Tensor | Dataset | str | Path | None = None,
    *,
    attributes: Sequence[worlds.Attributes] = (),
    scenes: Sequence[Scene] = (),
    species: Sequence[str] = (),
    species_judge: SpeciesJudge | None = None,
    teacher: StableDiffusionPipeline | Scores | None = None,
    latents: LatentDataset | None = None,
    metrics: Sequence[str] = (),
    extractor: str = "mini-clip",
    perceptual: str = "mini-lpips",
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 25,
    guidance: float = 7.5,
    batch_size: int = 32,
    baseline_draws: int = 10,
) -> Scores:
    """Generate an image of every prompt with every seed, and score them.

    `reference` are real images: uint8 (M, 3, H, W), a data set of `load_dataset`, a folder or a
    world's name. Fréchet distance, KID, precision and recall compare N generated with N of them (or
    all, if there are fewer), the real-vs-real baseline real with real at the same count.
    `attributes` are those of the prompts, for the accuracy on the worlds; `scenes` those that they
    ask for, where they have several objects; `species` what each asks for, of those that a
    `species_judge` knows (see `species.fit_species`). `teacher` generates from the same prompts and
    noise, or is what an earlier `evaluate` found of it: `lpips_to_teacher` is the paired distance.
    With a teacher pipeline and held-back `latents` there is an `output_error`.
    `diversity` is the perceptual distance of images of one prompt from two seeds; two seeds make
    one pair, which has no spread.

    `metrics` are names of `METRICS`; empty, all for which there is what they need. A Fréchet
    distance is called "fid" with the published Inception-v3 features and "fd" with others. Before
    anything is generated, `ValueError` is raised for a metric that was asked for by name and cannot
    be computed (where it was not, its row says why and has no value), for unknown names, for images
    that are not uint8 or of another size, for attributes that are not one a prompt, for equal
    seeds, and for a teacher that was evaluated with other prompts, seeds or settings;
    `RuntimeError` for a network in training mode or an extractor that cannot be loaded.
    """
    prompts, seeds = as_texts("prompts", prompts), as_seeds("seeds", seeds)
    if not prompts:
        raise ValueError("give at least one prompt")
    metrics = as_texts("metrics", metrics)
    steps, batch_size = whole_number("steps", steps, 1), whole_number("batch_size", batch_size, 1)
    baseline_draws = whole_number("baseline_draws", baseline_draws, 1)
    if finite_number("guidance", guidance) < 0:
        raise ValueError(f"guidance must not be negative: {guidance}")
    for place, one in enumerate(attributes):
        if not isinstance(one, worlds.Attributes):
            raise TypeError(f"attributes must be worlds.Attributes, but number {place} is {one!r}")
    for place, asked in enumerate(scenes):
        if not isinstance(asked, Scene):
            raise TypeError(f"scenes must be scenes.Scene, but number {place} is {asked!r}")
    species = as_texts("species", species)
    for what, given in {"attributes": attributes, "scenes": scenes, "species": species}.items():
        if given and len(given) != len(prompts):
            raise ValueError(f"{len(given)} {what} for {len(prompts)} prompts")
    if species and species_judge and (unknown := sorted(set(species) - set(species_judge.names))):
        names = ", ".join(species_judge.names)
        raise ValueError(f"the judge of species does not know {unknown}, only {names}")
    how = {"steps": steps, "guidance": guidance, "batch_size": batch_size}
    generated_with = how | {"prompts": prompts, "seeds": seeds}
    refuse_training(pipeline, "pipeline")
    if isinstance(teacher, Scores):
        check_alike(generated_with, teacher.generated_with)
    elif teacher is not None:
        refuse_training(teacher, "teacher")
    see = find_extractor(extractor)
    real = _features_of(reference, see, pipeline) if reference is not None else None
    chosen = _same_count(real, len(prompts)) if real is not None else None
    has = _available(see, real, attributes, teacher, latents, seeds)
    has |= {"scenes"} if scenes else set()
    has |= {"species"} if species and species_judge else set()
    refused = refusals(has, len(prompts), see.width, None if real is None else len(real))
    wanted = [name for name in METRICS if not metrics or name in _names(metrics)]
    refuse_named(metrics, {label(n, see.name): why for n, why in refused.items()} | refused)
    distance = None
    if any(n in wanted and n not in refused for n in ("lpips_to_teacher", "diversity")):
        distance = find_perceptual(perceptual)
    images = _generated(pipeline, prompts, seeds, how)
    theirs = None
    if "lpips_to_teacher" in wanted and "pairs" in has:
        known = isinstance(teacher, Scores)
        theirs = teacher.images if known else _generated(teacher, prompts, seeds, how)

    possible = [name for name in wanted if name not in refused]
    by_seed: dict[str, list[float]] = {}
    per_image: dict[str, list[Tensor]] = {}
    features = []
    for number in range(len(seeds)):
        paired = len(seeds) > 2 or (len(seeds) == 2 and number == 0)  # else a pair comes twice
        evidence = Evidence(
            images=images[number],
            extractor=see,
            perceptual=distance,
            prompts=prompts,
            attributes=attributes,
            scenes=scenes,
            species=species,
            species_judge=species_judge,
            reference=chosen,
            teacher_images=None if theirs is None else theirs[number],
            other_images=images[number - 1] if paired else None,
            latents=latents,
            pipeline=pipeline,
            teacher=None if isinstance(teacher, Scores) else teacher,
        )
        features.append(evidence.features)
        values, _ = score(evidence, [n for n in possible if n != "diversity" or paired])
        for name, value in means(values).items():
            by_seed.setdefault(name, []).append(value)
        for name, each in values.items():
            if isinstance(each, Tensor):
                per_image.setdefault(name, []).append(each)

    rows = {}
    for name in wanted:
        metric = METRICS[name]
        over_seeds = by_seed.get(name, [float("nan")])
        low, high = student_interval(over_seeds)
        baseline = (float("nan"), float("nan"))
        if metric.of_sets and name in by_seed:
            baseline = real_vs_real(metric.measure, real, len(prompts), baseline_draws)
        judge, checksum = _judge_of(name, see, distance, species_judge)
        rows[label(name, see.name)] = {
            "value": float(np.mean(over_seeds)),
            "spread": float(np.std(over_seeds, ddof=1)) if len(over_seeds) > 1 else float("nan"),
            "low": low,
            "high": high,
            "samples": len(prompts),
            "real_vs_real": baseline[0],
            "real_vs_real_spread": baseline[1],
            "extractor": judge,
            "checksum": checksum,
            "seeds": ", ".join(map(str, seeds)),
            "note": refused.get(name) or _note(name, len(prompts), seeds, real),
        }
    generated_with |= {"extractor": extractor, "perceptual": perceptual}
    generated_with |= {"attributes": list(attributes), "scenes": list(scenes), "species": species}
    table = pd.DataFrame(rows).T.rename_axis("score")
    numbers = ["value", "spread", "low", "high", "real_vs_real", "real_vs_real_spread"]
    table[numbers] = table[numbers].astype(float)
    return Scores(
        table,
        {label(name, see.name): values for name, values in by_seed.items()},
        torch.stack(features),
        {name: torch.stack(values) for name, values in per_image.items()},
        images,
        chosen,
        generated_with,
    )


def _names(metrics: Sequence[str]) -> set[str]:
    """The names in `METRICS` behind names or labels. Raises `ValueError` for an unknown one."""
    for name in metrics:
        metric_of(name)
    return {"fd" if name == "fid" else name for name in metrics}


def _available(see, real, attributes, teacher, latents, seeds) -> set[str]:
    """Which needs of metrics will be met once the images are there."""
    met = {
        "features": True,
        "reference": real is not None,
        "prompts": see.read is not None,
        "attributes": bool(attributes),
        "pairs": teacher is not None,
        "seeds": len(seeds) > 1,
        "latents": latents is not None and isinstance(teacher, StableDiffusionPipeline),
    }
    return {name for name, there in met.items() if there}


def _judge_of(
    name: str, see: Extractor, distance: Perceptual | None, species: SpeciesJudge | None
) -> tuple[str, str]:
    """The name and checksum of the network behind a metric."""
    needs = METRICS[name].needs
    if "attributes" in needs:
        return "mini-classifier", fingerprint(*judges.attribute_classifier().state_dict().values())
    if "scenes" in needs:
        return "mini-scene-judge", fingerprint(*scene_judge().state_dict().values())
    if "species" in needs:
        return (species.name, species.checksum) if species else ("-", "-")
    if needs & {"pairs", "seeds"}:
        return (distance.name, distance.checksum) if distance else ("-", "-")
    if "features" in needs:
        return see.name, see.checksum
    return "-", "-"


def check_alike(ours: dict, theirs: dict, may_differ: Iterable[str] = ()) -> None:
    """Raise `ValueError` where two evaluations differ in what `ours` names.

    Settings named in `may_differ` may (a name by itself is one); the message names the first that
    does and may not.
    """
    free = set(as_texts("may_differ", may_differ))
    for name, value in ours.items():
        if name not in free and value != theirs[name]:
            raise ValueError(
                f"the evaluations differ in {name}: they cannot be compared, unless you pass"
                f" may_differ=({name!r},)"
            )


def _generated(pipeline, prompts, seeds, how: dict) -> Tensor:
    return torch.stack([generate(pipeline, prompts, seed=seed, **how) for seed in seeds])


def refuse_training(pipeline: StableDiffusionPipeline, name: str = "pipeline") -> None:
    """Raise `RuntimeError` where a network of the pipeline is in training mode."""
    for part in ("unet", "vae", "text_encoder"):
        if getattr(pipeline, part).training:
            raise RuntimeError(f"{name}.{part} is in training mode: call .eval() on it")


def _note(name: str, count: int, seeds: Sequence[int], real: Tensor | None) -> str:
    """Warnings that travel with a number."""
    notes = []
    if len(seeds) < 3:
        notes.append(f"{len(seeds)} seed(s): the spread is not known well")
    if METRICS[name].of_sets and real is not None:
        if len(real) < 2 * count:
            notes.append(f"no baseline: {len(real)} reference images, {2 * count} needed")
        if len(real) < count:
            notes.append(f"compared with {len(real)} only")
    return "; ".join(notes)


def _features_of(reference, see: Extractor, pipeline) -> Tensor:
    """Features of reference images, computed once for images of that content."""
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if isinstance(reference, str | Path):
        reference = load_dataset(reference, "test", size)
    if len(reference) == 0:
        raise ValueError("the reference holds no images")
    if not isinstance(reference, Tensor):
        reference = _images_of(reference)
    check_images(reference)
    if reference.shape[-2:] != (size, size):
        raise ValueError(
            f"reference images are {tuple(reference.shape[-2:])}, the pipeline draws {size} x "
            f"{size}: resizing would be part of the score, so do it yourself, the same for both"
        )
    key = fingerprint(reference), see.checksum
    if key not in _REFERENCES:
        _REFERENCES[key] = see(reference)
    return _REFERENCES[key]


def _images_of(dataset: Dataset) -> Tensor:
    """The images of a data set as uint8 (N, 3, H, W), read one by one into one copy of all."""
    first = as_bytes(dataset[0]["image"])
    images = torch.empty(len(dataset), *first.shape, dtype=torch.uint8)  # type: ignore[arg-type]
    for place in range(len(images)):
        image = as_bytes(dataset[place]["image"])
        if image.shape != first.shape:
            raise ValueError(
                f"the reference's images differ in size: {tuple(first.shape)} and, number {place}, "
                f"{tuple(image.shape)}"
            )
        images[place] = image
    return images


def _same_count(real: Tensor, count: int) -> Tensor:
    """As many rows of the reference as there are images of one seed, always the same ones."""
    rows = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    return real[rows[:count]]
