"""Training images for the mini models: world renderings and dead leaves.

Dead leaves, shapes of power-law sizes that hide one another, share the edge and scale statistics of
photographs (Lee, Mumford and Huang, 2001; Baradad et al., arXiv 2106.05963), so an autoencoder that
has seen them passes photographs it never saw.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kdc.data import scenes, worlds


def dead_leaves(rng: np.random.Generator, size: int = 64, shapes: int = 70) -> np.ndarray:
    """One dead-leaves image, (size, size, 3) uint8: shaded, slightly textured ellipses."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(line, -line)
    base, spread = rng.uniform(0.15, 0.85, 3), rng.uniform(0.1, 0.45)
    image = np.broadcast_to(base.astype(np.float32), (size, size, 3)).copy()
    radii = np.sort(0.05 * (1 - rng.random(shapes) * 0.995) ** -0.65)[::-1]
    for radius in np.minimum(radii, 1.2):
        cx, cy, angle = rng.uniform(-1.1, 1.1), rng.uniform(-1.1, 1.1), rng.uniform(0, np.pi)
        u, v = x - cx, y - cy
        u, v = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
        flat = rng.uniform(0.25, 1.0)
        distance = (np.sqrt(u**2 + (v / flat) ** 2) - radius) * flat
        alpha = np.clip(0.5 - distance * size / 2 / rng.uniform(1.0, 2.5), 0, 1)[..., None]
        colour = np.clip(base + spread * rng.standard_normal(3), 0, 1)
        light = 1 + rng.uniform(-0.5, 0.5) * u / radius + rng.uniform(-0.3, 0.3) * v / radius
        if rng.random() < 0.3:
            light = light + rng.uniform(0.05, 0.25) * np.sin(u * rng.uniform(8, 60))
        image += alpha * (np.clip(colour * light[..., None], 0, 1) - image)
    noise = np.fft.rfft2(rng.standard_normal((3, size, size)))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) + 1 / size
    texture = np.fft.irfft2(noise / frequency, s=(size, size))
    image += rng.uniform(0, 0.08) * (texture / texture.std()).transpose(1, 2, 0)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def leaf_images(count: int, seed: int) -> Tensor:
    """(count, 3, 64, 64) uint8 dead-leaves images."""
    rng = np.random.default_rng(seed)
    images = [dead_leaves(rng) for _ in tqdm(range(count), desc="dead leaves", mininterval=2)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def scene_images(
    count: int, split: str, seed: int = 0, held_out: bool = False, objects: int | None = None
) -> tuple[Tensor, list[scenes.Scene]]:
    """(count, 3, 64, 64) uint8 renderings of scenes, and what each shows; see `world_images`."""
    one = functools.partial(
        _scene_image, split=split, seed=seed, held_out=held_out, objects=objects
    )
    return _rendered(one, count, f"{split} scenes")


def _scene_image(
    index: int, split: str, seed: int, held_out: bool, objects: int | None
) -> tuple[np.ndarray, scenes.Scene]:
    rng = scenes.rendering_rng(split, index, seed)
    shown = scenes.draw_scene(rng, objects, held_out)
    return scenes.render(shown, rng), shown


def world_images(
    count: int, split: str, seed: int = 0, held_out: bool = False
) -> tuple[Tensor, list[worlds.Attributes]]:
    """(count, 3, 64, 64) uint8 renderings, the worlds in turn, and what each shows.

    Many are rendered by several processes; each has a seed of its own, so they are the same.
    """
    one = functools.partial(_world_image, split=split, seed=seed, held_out=held_out)
    return _rendered(one, count, f"{split} renderings")


def _rendered(one: Callable, count: int, said: str) -> tuple[Tensor, list]:
    """What `one(index)` draws for so many indices: images (count, 3, H, W), and what they show."""
    bar = functools.partial(tqdm, total=count, desc=said, mininterval=2)
    processes = min(8, os.cpu_count() or 1) if count >= 1000 else 1
    if processes == 1:
        found = list(bar(map(one, range(count))))
    else:
        # A process of its own each: this one may have threads and a GPU already.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            found = list(bar(pool.map(one, range(count), chunksize=64)))
    images = torch.from_numpy(np.stack([image for image, _ in found]))
    return images.permute(0, 3, 1, 2).contiguous(), [shown for _, shown in found]


def _world_image(
    index: int, split: str, seed: int, held_out: bool
) -> tuple[np.ndarray, worlds.Attributes]:
    names = list(worlds.WORLDS)
    name = names[index % len(names)]
    rng = worlds.rendering_rng(name, split, index // len(names), seed)
    shown = worlds.draw_attributes(name, rng, held_out)
    return worlds.render(shown, rng), shown


def to_signed(images: Tensor) -> Tensor:
    """uint8 images to float in [-1, 1], the range of the autoencoder."""
    return images.float() / 127.5 - 1
