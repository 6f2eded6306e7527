"""What a buffer's precision costs in quality, and what the students drew beside the rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from kdc.data.latents import LatentDataset
from kdc.replay.buffer import ReplayBuffer
from kdc.replay.storage import DTYPES
from studies.common.protocol import cut
from studies.replay.study import stem_of


@torch.inference_mode()
def decoded(pipeline: StableDiffusionPipeline, mean: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in [-1, 1] that scaled latents (N, 4, h, w) decode to."""
    vae = pipeline.vae
    latents = mean.to(vae.device, vae.dtype) / vae.config.scaling_factor
    parts = [vae.decode(x).sample for x in latents.split(32)]
    return torch.cat(parts).float().clamp(-1, 1).cpu()


def decoded_loss(
    pipeline: StableDiffusionPipeline, data: LatentDataset, count: int = 64
) -> dict[str, float]:
    """By the dtype of a buffer: the PSNR in dB of images decoded from what it stored.

    They are compared with those that the exact means of the first `count` items decode to, as
    images in [0, 1]. Infinite where nothing is lost.
    """
    rows = torch.arange(min(count, len(data)))
    exact, found = decoded(pipeline, data.mean[rows]), {}
    for dtype in DTYPES:
        buffer = ReplayBuffer(len(rows), "fifo", dtype)
        buffer.add(data, rows)
        generated = decoded(pipeline, buffer.items()["mean"])
        found[dtype] = peak_signal_noise_ratio(generated, exact, data_range=2.0).item()
    return found


def generated_after(
    folder: str | Path,
    name: str,
    order: str,
    seed: int,
    tasks: Sequence[str],
    labels: Iterable[str],
    columns: int,
) -> dict[str, list[np.ndarray]]:
    """The images that `forgetting.study` kept in `folder`: a row for each trial and task.

    `tasks` are the names of the tasks in their order, `columns` the number of prompts.
    """
    rows = {}
    for label in labels:
        file = stem_of(folder, name, order, label, seed).with_suffix(".png")
        names = [f"{label}, after {task}" for task in tasks]
        rows |= cut(np.asarray(Image.open(file)), names, columns)
    return rows
