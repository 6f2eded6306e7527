"""Captioned images by name or folder: the procedural worlds, and folders of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from kdc.data import worlds
from kdc.data.folders import FOLDER_SPLITS, FolderDataset, read_folder


class WorldDataset(Dataset):
    """Renderings of one world or of both in turn, drawn when asked for.

    Items: {"image" (3, size, size) in [-1, 1], "caption", "attributes"}.
    """

    def __init__(
        self,
        names: Sequence[str],
        split: str = "train",
        size: int = 64,
        count: int = 2000,
        seed: int = 0,
        held_out: bool = False,
    ):
        self.names = [worlds.world(name).name for name in names]
        self.split, self.size, self.count = split, size, count
        self.seed, self.held_out = seed, held_out
        worlds.rendering_rng(self.names[0], split, 0)  # an unknown split is refused here

    def __len__(self) -> int:
        return self.count

    def caption(self, index: int) -> str:
        return worlds.caption(self._draw(index)[0])

    def _draw(self, index: int):
        if not 0 <= index < self.count:
            raise IndexError(index)
        name = self.names[index % len(self.names)]
        rng = worlds.rendering_rng(name, self.split, index // len(self.names), self.seed)
        return worlds.draw_attributes(name, rng, self.held_out), rng

    def __getitem__(self, index: int) -> dict:
        attributes, rng = self._draw(index)
        image = torch.from_numpy(worlds.render(attributes, rng, self.size)).permute(2, 0, 1)
        return {
            "image": image.float() / 127.5 - 1,
            "caption": worlds.caption(attributes),
            "attributes": attributes,
        }


def _world_names(source: str | Path) -> list[str]:
    """The worlds that a name stands for; none for any other name."""
    if source == "worlds":
        return list(worlds.WORLDS)
    return [str(source)] if str(source) in worlds.WORLDS else []


def _read_worlds(source, split, size, *, count, seed, held_out) -> WorldDataset:
    return WorldDataset(_world_names(source), split, size, count, seed, held_out)


def _read_folder(source, split, size, **of_worlds) -> FolderDataset:
    return read_folder(Path(source).expanduser(), split, size)


@dataclass(frozen=True)
class Kind:
    """One entry of `DATASETS`."""

    # Whether this kind reads what was given, a name or a path.
    knows: Callable[[str | Path], bool]
    # Called as read(source, split, size, count=, seed=, held_out=). Its items are dictionaries with
    # "image" (3, size, size) in [-1, 1] and "caption", and it has a method `caption(index)`.
    read: Callable[..., Any]


# The first kind that knows a source reads it.
DATASETS: dict[str, Kind] = {
    "worlds": Kind(lambda source: bool(_world_names(source)), _read_worlds),
    "folder": Kind(lambda source: Path(source).expanduser().is_dir(), _read_folder),
}


def load_dataset(
    name_or_folder: str | Path,
    split: str = "train",
    size: int = 64,
    *,
    count: int = 2000,
    seed: int = 0,
    held_out: bool = False,
) -> WorldDataset | FolderDataset:
    """A captioned data set: "flora", "lepidoptera", "worlds" (both), or a folder of images.

    Which kinds there are stands in `DATASETS`.
    `count`, `seed` and `held_out` concern the worlds. A folder may hold `train/` and `test/`; where
    it does not, one image in five, chosen by the hash of its name, is for testing. Every file is
    opened once: those that are no readable image are left out and named in a warning. Raises
    `FileNotFoundError` for a missing folder and `ValueError` for one without images.
    """
    if split not in FOLDER_SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are train and test")
    for kind in DATASETS.values():
        if kind.knows(name_or_folder):
            return kind.read(name_or_folder, split, size, count=count, seed=seed, held_out=held_out)
    raise FileNotFoundError(
        f"no data set {str(name_or_folder)!r}: neither a folder nor one of "
        f"{', '.join(worlds.WORLDS)}, worlds"
    )
