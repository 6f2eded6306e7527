"""What each distillation term contributes: recipes after equal steps on equal data, over seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from kdc import pipelines
from kdc.continual.sequence import run_sequence
from kdc.continual.tasks import Task
from kdc.data.latents import LatentDataset
from kdc.distillation.distill import distill
from kdc.distillation.features import feature_pairs
from kdc.distillation.fidelity import output_error
from kdc.distillation.losses import LossWeights
from kdc.distillation.step import DistillationStep, forward_process
from kdc.io import fingerprint, make_once, write_image
from kdc.unet.slimming import slim
from studies.common.protocol import Extent, Setup, score, slug, strip
from studies.common.recipes import RECIPES, Recipe, images_of
from studies.common.teacher_cache import Answer, remembering

SHOWN = (  # the last four show a combination that no training image shows
    "a red daisy on a sky background",
    "a purple lily on a meadow background",
    "a blue eyed butterfly on a night background",
    "a white bordered butterfly on a sand background",
    "a red sunflower on a night background",
    "a yellow lily on a sky background",
    "an orange eyed butterfly on a meadow background",
    "a pink plain butterfly on a sand background",
)


# The two progress lines that the authors' log keeps of 40 updates on Stable Diffusion, each of one
# forward pass over 4,096 latent pixels. The first comes before any change of the weights: a freshly
# cut student. The KL is not logged; it is what is left of the total, which has three digits.
AUTHORS_LOG = {
    "update 1": {"loss": 298.0, "task": 0.321, "output": 0.143, "feature": 95.2, "soft": 202.3},
    "update 40": {"loss": 178.0, "task": 0.472, "output": 0.0887, "feature": 55.1, "soft": 122.3},
}


@dataclass(frozen=True)
class Settings(Extent):
    """How much is measured. The defaults are those of the budget `standard`."""

    thinned: int = 2
    unseen_copies: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 5e-4
    made_images: int = 4  # by the teacher, of each combination, never-trained ones too


def follow(
    setup: Setup,
    data: LatentDataset,
    recipe: Recipe,
    seed: int,
    settings: Settings,
    answers: dict[str, Answer] | None = None,
) -> tuple[UNet2DConditionModel, pd.DataFrame]:
    """Make a student by a recipe; the student, and the log of its training.

    `answers` are those of the teacher, to be shared by recipes of the same seed and data.
    """
    teacher = setup.teacher.unet
    unet = slim(teacher, recipe.plan, recipe.init, seed)
    names = [name for _, name in feature_pairs(slim(teacher, "kdc"), teacher, "both")]
    training = {
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "seed": seed,
    } | dict(recipe.training)
    with remembering(teacher, names, {} if answers is None else answers):
        if recipe.last_sample:  # the sequence of one task that the authors' replay makes
            result = run_sequence(
                [Task("all", data)],
                "last_sample",
                unet,
                setup.teacher,
                evaluate=lambda pipeline, task: {"none": 0.0},
                higher_is_better={"none": True},
                ahead=False,
                weights=recipe.weights,
                **training,
            )
            return unet, result.logs[0]
        log = distill(
            unet,
            setup.teacher,
            data,
            weights=recipe.weights,
            label=f"seed {seed}",
            **training,
        )
    return unet, log


def authors_ratio(
    setup: Setup, seeds: Sequence[int] = range(8), batches: int = 4, batch_size: int = 16
) -> pd.DataFrame:
    """The terms as in the authors' code on a freshly cut student, a row a seed.

    Columns: the means over `batches` of each term, and `ratio`, features over softened KL, to be
    held against the first line of `AUTHORS_LOG`. The KL sums over pixels, of which Stable
    Diffusion's latents have 4,096 and the mini's fewer: `per 4096` is the ratio as it would be with
    as many.
    """
    weights = LossWeights.as_published()
    pixels = setup.train.mean.shape[-2] * setup.train.mean.shape[-1]
    student = slim(setup.teacher.unet, "kdc").eval()
    rows = []
    with contextlib.closing(
        DistillationStep(student, setup.teacher.unet, forward_process(setup.teacher), weights)
    ) as distillation_step:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            terms = []
            for _ in range(batches):
                batch = setup.train.draw(batch_size, generator, 0.0)
                with torch.no_grad():
                    found = distillation_step(student, *batch, generator)
                terms.append({name: found[name].item() for name in weights.enabled})
            row = pd.DataFrame(terms).mean().to_dict()
            ratio = row["feature"] / row["soft"]
            rows.append({"seed": seed} | row | {"ratio": ratio, "per 4096": ratio * pixels / 4096})
    return pd.DataFrame(rows)


def judge(setup: Setup, unet: UNet2DConditionModel, seed: int) -> dict:
    """A student's scores on test images."""
    row = {"output_error": output_error(unet, setup.teacher, setup.test).mean()}
    return row | score(setup, pipelines.with_unet(setup.teacher, unet), seed)


def _as_usual(recipe: Recipe) -> bool:
    """Whether a recipe draws its batches as most do, and so asks the teacher what they ask."""
    return recipe.data == "real" and not recipe.training and not recipe.last_sample


def fixed_of(setup: Setup, settings: Settings) -> dict:
    """What all rows of a folder share."""
    fixed = {k: v for k, v in dataclasses.asdict(settings).items() if k != "seeds"}
    return fixed | {"teacher": fingerprint(*setup.teacher.unet.state_dict().values())}


def study(
    setup: Setup,
    settings: Settings,
    folder: str | Path,
    recipes: Mapping[str, Recipe] = RECIPES,
) -> tuple[pd.DataFrame, dict[str, list]]:
    """A row for each recipe and seed, and each recipe's logs, one a seed.

    Each is stored in `folder` as soon as it is there and read back by a later call, so a study that
    was stopped goes on. Raises `ValueError` where `folder` holds rows of other settings.
    """
    fixed = fixed_of(setup, settings)
    makes = {"made_images": settings.made_images, "steps": settings.sampling_steps}
    images = functools.cache(
        functools.partial(images_of, pipeline=setup.teacher, real=setup.train, **makes)
    )
    rows, logs = [], {}
    for seed in settings.seeds:
        answers: dict[str, Answer] = {}  # 5 MB a step
        for name, recipe in recipes.items():
            stem = Path(folder) / f"{slug(name)}-{seed}"

            def make(recipe=recipe, seed=seed, answers=answers, stem=stem) -> dict:
                shared = answers if _as_usual(recipe) else {}
                unet, log = follow(setup, images(recipe.data), recipe, seed, settings, shared)
                if seed == settings.seeds[0] and setup.asked:
                    student = pipelines.with_unet(setup.teacher, unet)
                    shown = Image.fromarray(strip(student, SHOWN, settings.sampling_steps))
                    write_image(stem.with_suffix(".png"), shown)
                return {"row": judge(setup, unet, seed), "log": log.to_dict("list")}

            made_with = fixed | {"recipe": recipe.to_dict(), "seed": seed}
            found = make_once(stem.with_suffix(".json"), made_with, make)
            rows.append({"candidate": name, "seed": seed} | found["row"])
            logs.setdefault(name, []).append(found["log"])
    return pd.DataFrame(rows), logs
