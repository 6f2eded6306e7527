"""What is asked for, and true renderings of it to compare with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kdc.data import scenes, worlds


def balanced_prompts(copies: int, held_out: bool) -> list[worlds.Attributes]:
    """Every combination of both worlds, `copies` times, in a fixed order."""
    every = [a for w in worlds.WORLDS.values() for a in w.combinations(held_out)]
    return every * copies


def renderings_of(shown: list[worlds.Attributes], seed: int) -> Tensor:
    """Test renderings (N, 3, 64, 64) uint8 of the listed attributes."""
    images = []
    for index, a in enumerate(tqdm(shown, desc="renderings", mininterval=2)):
        rng = worlds.rendering_rng(a.world, "test", index, seed)
        images.append(torch.from_numpy(worlds.render(a, rng)).permute(2, 0, 1))
    return torch.stack(images)


def scene_renderings(asked: list[scenes.Scene], seed: int) -> Tensor:
    """Test renderings (N, 3, 64, 64) uint8 of the listed scenes."""
    rendered = [
        scenes.render(scene, scenes.rendering_rng("test", index, seed))
        for index, scene in enumerate(asked)
    ]
    return torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2).contiguous()
