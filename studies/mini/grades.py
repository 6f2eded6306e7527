"""Grades of the mini models on held-out renderings; `make grades` writes them to `results/`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from kdc import pipelines
from kdc.data import scenes, worlds
from kdc.data.datasets import load_dataset
from kdc.evaluation.extractors import find_extractor
from kdc.evaluation.metrics import METRICS, Evidence, means, score
from kdc.evaluation.scene_judge import shown_scenes
from studies.common.renderings import balanced_prompts, renderings_of, scene_renderings
from studies.mini.images import scene_images

GOALS = {  # what was asked of the models; lower is better for "fd_over_real_vs_real" only
    "classifier": 0.99,
    "psnr_worlds": 28.0,
    "psnr_photos": 22.0,
    "colour": 0.95,
    "kind": 0.90,
    "background": 0.95,
    "held_out": 0.80,
    "fd_over_real_vs_real": 3.0,
}
STEPS, GUIDANCE, SEED = 25, 7.5, 2026
FD_GUIDANCE = 3.0  # beside the default one, which makes images alike
# The sets of scenes that are asked for: how many, of how many objects, and whether one of these is
# of a combination that no generator is trained on.
SCENE_SETS = {
    "one object": (240, 1, False),
    "two objects": (400, 2, False),
    "three objects": (160, 3, False),
    "one object, never trained": (120, 1, True),
    "two objects, never trained": (240, 2, True),
}
# What was asked of the teacher on scenes, as `report_scenes` names it; of the distance, at most.
SCENE_GOALS = {
    "one object, its worst attribute": 0.97,
    "two objects, all attributes on the right one": 0.90,
    "one object, never trained": 0.80,
    "two objects, never trained": 0.80,
    "Fréchet distance at guidance 3, over real-vs-real": 3.0,
}
SCENE_JUDGE_GOAL = 0.98  # of scenes in which it must find all right
ACCURACIES = ("colour", "kind", "background", "accuracy")


@torch.inference_mode()
def reconstruct(pipeline: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1], encoded and decoded by the pipeline's autoencoder."""
    parts = []
    for batch in images.split(64):
        latents = pipeline.vae.encode(batch.to(pipeline.device)).latent_dist.mean
        parts.append(pipeline.vae.decode(latents).sample.clamp(-1, 1).cpu())
    return torch.cat(parts)


def psnr(pipeline: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (N,), of the autoencoder on images in [-1, 1]."""
    error = (reconstruct(pipeline, images) - images.cpu()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


def grade_classifier(copies: int = 6) -> dict[str, float]:
    """Accuracy of the attribute classifier on real renderings, held-out combinations included."""
    shown = balanced_prompts(copies, False) + balanced_prompts(copies, True)
    evidence = Evidence(images=renderings_of(shown, seed=1), attributes=shown)
    found = means(score(evidence, ACCURACIES)[0])
    return {_all(name): found[name] for name in ACCURACIES}


def grade_scene_judge(count: int = 400) -> dict[str, dict[str, float]]:
    """What the judge of scenes says of real renderings, by the number of objects; see `METRICS`.

    "rare": of scenes with a combination that no generator is trained on.
    """
    found = {}
    for objects in (1, 2, 3):
        for name, held_out in ((str(objects), False), (f"{objects} rare", True)):
            images, asked = scene_images(count, "test", 1, held_out, objects)
            found[name] = {
                k: v.float().mean().item() for k, v in shown_scenes(images, asked).items()
            }
    return found


def grade_autoencoder(
    pipeline: StableDiffusionPipeline, photos: str | Path | None = None
) -> dict[str, float]:
    """Mean PSNR on test renderings and, where a folder is given, on its test photographs."""
    images = renderings_of(balanced_prompts(2, False), seed=2).float() / 127.5 - 1
    grades = {"psnr_worlds": psnr(pipeline, images).mean().item()}
    if photos:
        dataset = load_dataset(photos, split="test")
        images = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
        grades["psnr_photos"] = psnr(pipeline, images).mean().item()
        grades["photos"] = len(dataset)
    return grades


def grade_pipeline(
    pipeline: StableDiffusionPipeline,
    copies: int = 2,
    held_out_copies: int = 6,
    guidance: float = GUIDANCE,
) -> dict[str, float]:
    """Attribute accuracy on usual and on never-trained combinations; Fréchet distance and baseline.

    The reference and the baseline's second half are two sets of test renderings of the very
    combinations that were asked for, at the same count.
    """
    asked = balanced_prompts(copies, False)
    rare = balanced_prompts(held_out_copies, True)
    captions = [worlds.caption(a) for a in asked]
    generated = pipelines.generate(
        pipeline,
        captions + [worlds.caption(a) for a in rare],
        seed=SEED,
        steps=STEPS,
        guidance=guidance,
    )
    see = find_extractor("mini-clip")
    first, second = (see(renderings_of(asked, seed)) for seed in (3, 4))
    evidence = Evidence(
        images=generated[: len(asked)],
        extractor=see,
        prompts=captions,
        attributes=asked,
        reference=first,
    )
    usual = means(score(evidence, (*ACCURACIES, "fd", "clip"))[0])
    held_out = Evidence(images=generated[len(asked) :], attributes=rare)
    unseen = means(score(held_out, ACCURACIES)[0])
    grades = {_all(name): usual[name] for name in ACCURACIES}
    grades |= {f"held_out_{_all(name)}": unseen[name] for name in ACCURACIES}
    grades["fd"] = usual["fd"]
    grades["fd_real_vs_real"] = METRICS["fd"].measure(second, first)
    grades["fd_over_real_vs_real"] = grades["fd"] / grades["fd_real_vs_real"]
    grades["clip_score"] = usual["clip"]
    return grades | {"samples": len(asked), "held_out_samples": len(rare), "guidance": guidance}


def grade_scenes(
    pipeline: StableDiffusionPipeline, parts: int = 1, guidance: float = GUIDANCE
) -> dict:
    """What a model draws of the scenes that it is asked for, and how far from real ones it is.

    "shown": for each of `SCENE_SETS`, the shares of images that show what was asked for, see
    `shown_scenes`. "fd": Fréchet distances of the sets without never-trained combinations, at the
    default guidance and at `FD_GUIDANCE`, over "fd_real_vs_real": that of two sets of renderings of
    the very scenes that were asked for. `parts` above 1 takes so many times fewer scenes.
    """
    shown, images, usual = {}, [], []
    for number, (name, (count, objects, held_out)) in enumerate(SCENE_SETS.items()):
        _, asked = scene_images(max(2, count // parts), "test", 11 + number, held_out, objects)
        found = _generated(pipeline, asked, guidance)
        shown[name] = {k: v.float().mean().item() for k, v in shown_scenes(found, asked).items()}
        shown[name]["samples"] = len(asked)
        if not held_out:
            images.append(found)
            usual += asked
    see, measure = find_extractor("mini-clip"), METRICS["fd"].measure
    first, second = (see(scene_renderings(usual, seed)) for seed in (3, 4))
    baseline = measure(second, first)
    distances = {
        f"{guidance:g}": torch.cat(images),
        f"{FD_GUIDANCE:g}": _generated(pipeline, usual, FD_GUIDANCE),
    }
    return {
        "shown": shown,
        "fd": {name: measure(see(each), first) / baseline for name, each in distances.items()},
        "fd_real_vs_real": baseline,
        "fd_samples": len(usual),
        "guidance": guidance,
    }


def scene_summary(grades: Mapping[str, Any]) -> dict[str, float]:
    """What `grade_scenes` found, by the names of `SCENE_GOALS` and three more."""
    shown = grades["shown"]
    one, bound = shown["one object"], {name: each["binding"] for name, each in shown.items()}
    return {
        "one object, its worst attribute": min(
            one[name] for name in ("colour", "kind", "size", "background")
        ),
        "two objects, all attributes on the right one": bound["two objects"],
        "three objects, all attributes on the right one": bound["three objects"],
        "one object, never trained": bound["one object, never trained"],
        "two objects, never trained": bound["two objects, never trained"],
        "Fréchet distance at guidance 3, over real-vs-real": grades["fd"][f"{FD_GUIDANCE:g}"],
        "Fréchet distance at guidance 7.5, over real-vs-real": grades["fd"][f"{GUIDANCE:g}"],
    }


def report_scenes(stored: Mapping[str, Any]) -> pd.DataFrame:
    """The stored grades on scenes beside their goals: goal, met, and a column for each model."""
    found = {name: scene_summary(each) for name, each in stored["models"].items()}
    rows = {}
    for name, reached in found["teacher"].items():
        goal = SCENE_GOALS.get(name)
        lower = name.startswith("Fréchet")
        met = goal is not None and (reached <= goal if lower else reached >= goal)
        rows[name] = {
            "goal": "-" if goal is None else f"{goal:.1f}" if lower else f"{100 * goal:.0f} %",
            "met": "-" if goal is None else "yes" if met else "no",
            **{
                model: f"{each[name]:.1f}" if lower else f"{100 * each[name]:.1f} %"
                for model, each in found.items()
            },
        }
    table = pd.DataFrame(rows).T
    table.index.name = "grade"
    return table


def _generated(pipeline: StableDiffusionPipeline, asked: list, guidance: float) -> Tensor:
    captions = [scenes.caption(scene) for scene in asked]
    return pipelines.generate(pipeline, captions, seed=SEED, steps=STEPS, guidance=guidance)


def _all(name: str) -> str:
    """The stored name of an accuracy: the share that shows all attributes is "all"."""
    return "all" if name == "accuracy" else name


def explain_fd(
    pipeline: StableDiffusionPipeline, guidances: tuple[float, ...] = (1.5, 3.0, 7.5)
) -> dict:
    """Where the Fréchet distance comes from: its ratio to the baseline for several kinds of images.

    "autoencoder": real renderings, only encoded and decoded; "guidance g": images of the pipeline
    at that guidance, one for every combination, from another seed than the grades'.
    """
    asked = balanced_prompts(1, False)
    first, second = (renderings_of(asked, seed) for seed in (5, 6))
    see, measure = find_extractor("mini-clip"), METRICS["fd"].measure
    reference = see(first)
    baseline = measure(see(second), reference)
    restored = reconstruct(pipeline, second.float() / 127.5 - 1)
    images = {"autoencoder": ((restored + 1) * 127.5).round().to(torch.uint8)}
    captions = [worlds.caption(a) for a in asked]
    for guidance in guidances:
        images[f"guidance {guidance:g}"] = pipelines.generate(
            pipeline, captions, seed=SEED + 1, steps=STEPS, guidance=guidance
        )
    ratios = {
        name: measure(see(generated), reference) / baseline for name, generated in images.items()
    }
    return {"ratios": ratios, "real_vs_real": baseline, "samples": len(asked)}


def standard_error(share: float, count: int) -> float:
    """Binomial standard error of an observed share."""
    return math.sqrt(share * (1 - share) / count)


NAMES = {
    "classifier": "attribute classifier on real renderings, its worst attribute",
    "psnr_worlds": "autoencoder on the worlds",
    "psnr_photos": "autoencoder on photographs",
    "colour": "images show the asked-for colour",
    "kind": "... species or wing pattern",
    "background": "... background",
    "held_out": "... of never-trained combinations, the worst attribute",
    "fd_over_real_vs_real": "Fréchet distance over its real-vs-real baseline (lower is better)",
}


def report(stored: dict) -> pd.DataFrame:
    """The stored grades beside their goals, as the README and the appendix show them.

    Columns: goal, reached (judges, autoencoder and teacher), met, student.
    """
    attributes = ("colour", "kind", "background")
    teacher, student, autoencoder = stored["teacher"], stored["student"], stored["autoencoder"]
    reached = {
        "classifier": min(stored["classifier"][name] for name in attributes),
        "psnr_worlds": autoencoder["psnr_worlds"],
        "psnr_photos": autoencoder.get("psnr_photos"),
    }
    both = [*attributes, "fd_over_real_vs_real"]
    reached |= {name: teacher[name] for name in both}
    small = {name: student[name] for name in both}
    for grades, column in ((teacher, reached), (student, small)):
        column["held_out"] = min(grades[f"held_out_{name}"] for name in attributes)

    def shown(name: str, value: float | None) -> str:
        if value is None:
            return "-"
        if name.startswith("psnr"):
            return f"{value:.1f} dB"
        return f"{value:.1f}" if name == "fd_over_real_vs_real" else f"{100 * value:.1f} %"

    def met(name: str, value: float | None) -> str:
        if value is None:
            return "not measured"
        goal = GOALS[name]
        return (
            "yes" if (value <= goal if name == "fd_over_real_vs_real" else value >= goal) else "no"
        )

    rows = [
        (label, shown(name, GOALS[name]), shown(name, reached[name]), met(name, reached[name]),
         shown(name, small.get(name)))
        for name, label in NAMES.items()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["grade", "goal", "reached", "met", "student"]).set_index(
        "grade"
    )


def markdown(table: pd.DataFrame) -> str:
    """That table in Markdown, with its index as first column."""
    lines = [[table.index.name, *table.columns], ["---"] * (table.shape[1] + 1)]
    lines += [[index, *row] for index, row in zip(table.index, table.values.tolist(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
