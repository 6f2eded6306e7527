"""Which layout makes the inner blocks of a mini teacher earn their place: small runs on scenes.

Importance shows early, so each variant is trained on some ten thousand images only. Measured are
what bypassing each part of the U-Net costs (see `kdc.search.sensitivity`, at guidance 7.5), and how
well the noise in scenes it has not seen is predicted.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file

from kdc.data import scenes
from kdc.data.cache import cache_latents
from kdc.data.datasets import load_dataset
from kdc.io import fingerprint, make_once
from kdc.search import sensitivity
from kdc.unet.slimming import count_parameters
from studies.common.protocol import slug
from studies.mini import make
from studies.mini.autoencoder import train_autoencoder
from studies.mini.grades import grade_scenes
from studies.mini.images import scene_images
from studies.mini.teacher import (
    BATCH_SIZE,
    LEGS,
    STEPS,
    Layout,
    Leg,
    TextToNoise,
    as_pipeline,
    encode_images,
    new_unet,
    noise_scheduler,
    train_teacher,
)
from studies.mini.text import tokenize


@dataclass(frozen=True)
class Variant:
    """A layout of the mini teacher, and how it is trained."""

    layout: Layout
    # See `Leg`; through the whole of its short training.
    skip_dropout: float = 0.0


NARROW = (16, 32, 96, 160)
# The first is the shipped teacher's: two heads everywhere, skips as they are drawn.
VARIANTS = {
    "first round": Variant(Layout(heads=(2, 2, 2, 2), skips=1.0)),
    "heads 1-2-4-4": Variant(Layout(skips=1.0)),
    "quiet skips": Variant(Layout()),
    "quiet skips, dropped": Variant(Layout(), 0.5),
    "narrow outside": Variant(Layout(NARROW, skips=1.0)),
    "narrow outside, quiet skips, dropped": Variant(Layout(NARROW), 0.5),
}
# Second legs of the teacher, one change at a time: at the length of the others captions hardly
# matter. The last is the one that it has.
SECOND_LEGS = {
    "as the first leg": Leg(LEGS[1].share, hiding=0.25, skip_dropout=0.0, power=1.0),
    "captions hidden more often": Leg(LEGS[1].share, skip_dropout=0.0, power=1.0),
    "skips dropped": Leg(LEGS[1].share, hiding=0.25, power=1.0),
    "noisy levels count more": Leg(LEGS[1].share, hiding=0.25, skip_dropout=0.0),
    "all three": LEGS[1],
}


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured."""

    # Updates of the teacher, the images in each, and the learning rate.
    steps: int = 320
    batch_size: int = 32
    learning_rate: float = 1e-3
    # Updates of an autoencoder for latents of another side than 16, of 16 images.
    coding_steps: int = 1500
    # Renderings that are trained on.
    pool: int = 6000
    # Held-back scenes whose noise is predicted, at each of `LEVELS`.
    scenes: int = 256
    # Draws of the importance, each of so many images.
    draws: int = 3
    count: int = 16
    seed: int = 0


LEG_SETTINGS = Settings(STEPS, BATCH_SIZE, pool=40_000)
ONE_IN = 4  # after a leg one in so many of the scenes of the grades are asked for
LEVELS = (100, 300, 500, 700, 900)  # timesteps, of 1,000


def autoencoder_of(side: int, folder: Path, settings: Settings) -> AutoencoderKL:
    """The autoencoder of scenes with latents of that side: that of the mini models for 16."""
    if side == 16:
        make.make(folder, ("autoencoder",))
        return AutoencoderKL.from_pretrained(folder / "autoencoder" / "final", dtype=torch.float32)
    place = folder / "pilots" / f"autoencoder-{side}"
    if not (place / "final").is_dir():
        vae, _ = train_autoencoder(
            place / "run",
            settings.coding_steps,
            pool=settings.pool // 2,
            seed=settings.seed,
            factor=64 // side,
        )
        vae.save_pretrained(place / "new")
        (place / "new").rename(place / "final")
    return AutoencoderKL.from_pretrained(place / "final")


@torch.inference_mode()
def noise_error(vae: AutoencoderKL, model: TextToNoise, tokenizer, settings: Settings) -> float:
    """Mean squared error of the noise predicted in held-back scenes, over `LEVELS`."""
    images, shown = scene_images(settings.scenes, "test", seed=3)
    latents, _ = encode_images(vae, images)
    ids = tokenize(tokenizer, [scenes.caption(scene) for scene in shown])
    generator = torch.Generator().manual_seed(settings.seed)
    errors = []
    for level in LEVELS:
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.full((len(latents),), level)
        noisy = noise_scheduler().add_noise(latents, noise, timesteps)
        inputs = zip(*(x.to(vae.device).split(64) for x in (noisy, timesteps, ids)), strict=True)
        predicted = torch.cat([model(*batch).cpu() for batch in inputs])
        errors.append((predicted - noise).square().mean())
    return torch.stack(errors).mean().item()


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


def measure(name: str, folder: Path, settings: Settings) -> dict:
    """Train one variant, or go on with it, and measure it: a row in plain values."""
    variant = VARIANTS[name]
    place = folder / "pilots" / slug(name)

    def row() -> dict:
        vae = autoencoder_of(variant.layout.side, folder, settings)
        leg = Leg(1.0, 0.0, variant.skip_dropout, 1.0, "cosine")
        model, tokenizer, _ = train_teacher(
            vae, place / "run", settings.steps, settings.batch_size, settings.pool,
            settings.learning_rate, settings.seed, (leg,), variant.layout,
        )  # fmt: skip
        images = settings.steps * settings.batch_size
        return described(name, variant, images) | worth(vae, model, tokenizer, settings)

    made_with = asdict(settings) | asdict(variant)
    return make_once(place / "row.json", made_with, row)


def measure_second(name: str, folder: Path, settings: Settings) -> dict:
    """Train one of `SECOND_LEGS` from the teacher's first leg, or go on with it; measure it.

    The first leg is trained where it does not lie in `folder`, as the teacher's.
    """
    first, place = folder / "teacher" / "run", folder / "second-legs" / slug(name)
    if not (first / "leg-1.safetensors").is_file():
        _train(first, folder, settings, LEGS[:1])
    for file in ("leg-1.safetensors", "pool.safetensors"):
        if (first / file).is_file() and not (place / file).is_file():
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(first / file, place)
    leg, images = SECOND_LEGS[name], images_seen((LEGS[0], SECOND_LEGS[name]), settings)
    known = {"variant": name, **asdict(leg), "images": images}

    def row() -> dict:
        return known | after_leg(*_train(place, folder, settings, (LEGS[0], leg)), settings)

    return make_once(place / "row.json", asdict(settings) | asdict(leg), row)


def measure_legs(folder: Path, settings: Settings) -> list[dict]:
    """What the teacher in `folder` draws, and what its parts are worth, after each finished leg.

    Raises `FileNotFoundError` where there is none.
    """
    place, rows = folder / "teacher" / "run", []
    for number in range(1, len(LEGS) + 1):
        if not (file := place / f"leg-{number}.safetensors").is_file():
            continue
        known = {"leg": number, "images": images_seen(LEGS[:number], settings)}

        def row(number=number, known=known) -> dict:
            return known | after_leg(*_train(place, folder, settings, LEGS[:number]), settings)

        made_with = asdict(settings) | {"weights": fingerprint(*load_file(file).values())}
        rows.append(make_once(folder / "legs" / f"leg-{number}.json", made_with, row))
    if not rows:
        raise FileNotFoundError(f"{place} holds no finished leg of the teacher: train it first")
    return rows


def images_seen(legs: Sequence[Leg], settings: Settings) -> int:
    """How many images a training of these legs has seen."""
    return sum(leg.updates(settings.steps) * leg.together * settings.batch_size for leg in legs)


def after_leg(vae: AutoencoderKL, model: TextToNoise, tokenizer, settings: Settings) -> dict:
    """`worth`, and what images show, see `grade_scenes`."""
    teacher = as_pipeline(vae, model, tokenizer)
    return worth(vae, model, tokenizer, settings) | {"grades": grade_scenes(teacher, ONE_IN)}


def _train(place: Path, folder: Path, settings: Settings, legs: tuple[Leg, ...]) -> tuple:
    """Autoencoder, model and tokenizer after these legs; those that lie in `place` are read."""
    vae = autoencoder_of(Layout().side, folder, settings)
    model, tokenizer, _ = train_teacher(
        vae, place, settings.steps, settings.batch_size, settings.pool, settings.learning_rate,
        settings.seed, legs,
    )  # fmt: skip
    return vae, model.eval(), tokenizer


def described(name: str, variant: Variant, images: int) -> dict:
    """A variant's row before anything is measured."""
    return {
        "variant": name,
        **asdict(variant.layout),
        "skip_dropout": variant.skip_dropout,
        "parameters": count_parameters(new_unet(variant.layout)),
        "images": images,
    }


def worth(vae: AutoencoderKL, model: TextToNoise, tokenizer, settings: Settings) -> dict:
    """How well the noise is predicted, and what each part of the U-Net is worth."""
    teacher = as_pipeline(vae, model.eval(), tokenizer)
    return {
        "noise_error": noise_error(vae, model, tokenizer, settings),
        "importance": importance(teacher, settings).to_dict("index"),
    }
