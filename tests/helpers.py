"""What several tests build on: a small model to train, a death inside a run, a folder of images."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

import kdc
from kdc.data.latents import LatentDataset


def regression(seed=0):
    """A small module and a loss that draws its batches from the generator."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    target = torch.tensor([[1.0], [-2.0], [0.5]])

    def loss(model, generator):
        x = torch.randn(16, 3, generator=generator)
        return {"loss": (model(x) - x @ target).square().mean()}

    return model, loss


def weights(model) -> torch.Tensor:
    """All parameters, one after the other."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@contextlib.contextmanager
def draws_counted(stop_at: int | None = None, error: type = KeyboardInterrupt) -> Iterator[list]:
    """Batches drawn from latent data sets; the given one raises `error` instead of being drawn."""
    original, drawn = LatentDataset.draw, []

    def draw(self, *args, **kwargs):
        drawn.append(1)
        if len(drawn) == stop_at:
            raise error("stop")
        return original(self, *args, **kwargs)

    LatentDataset.draw = draw
    try:
        yield drawn
    finally:
        LatentDataset.draw = original


@contextlib.contextmanager
def calls_counted(*methods: tuple[object, str]) -> Iterator[list[str]]:
    """The names of these methods of objects, as often as they are called."""
    called: list[str] = []

    def counting(original, name):
        def call(*args, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        return call

    for owner, name in methods:
        setattr(owner, name, counting(getattr(owner, name), name))
    try:
        yield called
    finally:
        for owner, name in methods:
            delattr(owner, name)


def picture(file: Path) -> Path:
    """A small image that differs from those of other names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(zlib.crc32(str(file).encode()))
    Image.fromarray(draw.integers(0, 255, (12, 12, 3), np.uint8)).save(file)
    return file


def tree(root: Path, *names: str) -> Path:
    """A folder with such images."""
    for name in names:
        picture(root / name)
    return root


def captions_in(root: Path, split: str = "train", **how) -> dict[str, str]:
    """{path below the root: caption} of a split."""
    dataset = kdc.load_dataset(root, split, 8, **how)
    files = enumerate(dataset.files)
    return {file.relative_to(root).as_posix(): dataset.caption(i) for i, file in files}


def head_of(card):
    """The first lines of a model card, as values."""
    return yaml.safe_load(card.split("---\n")[1])
