"""Which layout makes the inner blocks of a mini teacher earn their place: small runs on scenes.

Importance shows early, so each variant is trained on a few ten thousand images only. Measured are
what bypassing each part of the U-Net costs (see `kdc.search.sensitivity`, at guidance 7.5), and how
many of the generated scenes show what was asked for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from diffusers import AutoencoderKL, StableDiffusionPipeline

from kdc.data import scenes
from kdc.data.cache import cache_latents
from kdc.data.datasets import load_dataset
from kdc.evaluation.scene_judge import shown_scenes
from kdc.io import make_once
from kdc.pipelines import generate
from kdc.search import sensitivity
from kdc.unet.slimming import count_parameters
from studies.mini.autoencoder import train_autoencoder
from studies.mini.grades import psnr
from studies.mini.images import scene_images, to_signed
from studies.mini.teacher import as_pipeline, train_teacher


@dataclass(frozen=True)
class Variant:
    """A layout of the mini teacher."""

    # Channels of the four stages, from the outermost.
    widths: tuple[int, int, int, int]
    # The side of its latents, 16 or 32.
    side: int = 16


# The first is today's layout.
VARIANTS = {
    "today": Variant((32, 64, 128, 128)),
    "narrow outside": Variant((16, 32, 96, 160)),
    "narrow outside, 32": Variant((16, 32, 96, 160), 32),
    "today, 32": Variant((32, 64, 128, 128), 32),
}


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured."""

    # Updates of the teacher, the images in each, and the learning rate.
    steps: int = 1600
    batch_size: int = 24
    learning_rate: float = 8e-4
    # Updates of the autoencoder, of 16 images.
    coding_steps: int = 1500
    # Renderings that are trained on.
    pool: int = 12_000
    # Scenes of two objects that are generated and judged, at so many steps of the sampler.
    scenes: int = 96
    sampling_steps: int = 16
    # Draws of the importance, each of so many images.
    draws: int = 3
    count: int = 16
    seed: int = 0


def autoencoder_of(side: int, folder: Path, settings: Settings) -> AutoencoderKL:
    """The autoencoder of scenes with latents of that side; variants of one side share it."""
    place = folder / f"autoencoder-{side}"
    if not (place / "final").is_dir():
        vae, _ = train_autoencoder(
            place / "run",
            settings.coding_steps,
            pool=settings.pool // 2,
            seed=settings.seed,
            draw=scene_images,
            factor=64 // side,
        )
        vae.save_pretrained(place / "new")
        (place / "new").rename(place / "final")
    return AutoencoderKL.from_pretrained(place / "final")


def importance(teacher: StableDiffusionPipeline, settings: Settings) -> pd.DataFrame:
    """What bypassing each part costs: columns `error`, `low` and `high` over draws, by `part`."""
    data = cache_latents(teacher, load_dataset("scenes", "test", count=4 * settings.count))
    rows = sensitivity(
        teacher, data, draws=settings.draws, count=settings.count, levels=4, guidance=7.5,
        seed=settings.seed,
    )  # fmt: skip
    by_draw = rows.groupby(["part", "draw"], sort=False)["error"].mean().unstack()
    return pd.DataFrame(
        {"error": by_draw.mean(axis=1), "low": by_draw.min(axis=1), "high": by_draw.max(axis=1)}
    )


def bound(teacher: StableDiffusionPipeline, settings: Settings) -> dict[str, float]:
    """What of scenes of two objects the teacher draws as asked, see `METRICS`."""
    _, asked = scene_images(settings.scenes, "test", seed=3, objects=2)
    captions = [scenes.caption(scene) for scene in asked]
    images = generate(teacher, captions, seed=settings.seed, steps=settings.sampling_steps)
    return {name: hits.float().mean().item() for name, hits in shown_scenes(images, asked).items()}


def measure(name: str, folder: Path, settings: Settings) -> dict:
    """Train one variant, or go on with it, and measure it: a row in plain values."""
    variant, place = VARIANTS[name], folder / name.replace(", ", "-").replace(" ", "-")

    def row() -> dict:
        vae = autoencoder_of(variant.side, folder, settings)
        model, tokenizer, _ = train_teacher(
            vae, place / "run", settings.steps, settings.batch_size, settings.pool,
            settings.learning_rate, settings.seed, scene_images, scenes.caption,
            widths=variant.widths, side=variant.side,
        )  # fmt: skip
        teacher = as_pipeline(vae, model.eval(), tokenizer)
        held_back, _ = scene_images(64, "test", seed=4)
        return {
            "variant": name,
            **asdict(variant),
            "parameters": count_parameters(teacher.unet),
            "images": settings.steps * settings.batch_size,
            "psnr": psnr(teacher, to_signed(held_back)).mean().item(),
            "shown": bound(teacher, settings),
            "importance": importance(teacher, settings).to_dict("index"),
        }

    made_with = asdict(settings) | asdict(variant)
    return make_once(place / "row.json", made_with, row)
