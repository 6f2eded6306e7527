"""Captioned images by name or folder: procedural worlds, published sets, folders of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from kdc.checks import MOST_SEEDS, whole_number
from kdc.data import scenes, worlds
from kdc.data.folders import FOLDER_SPLITS, FolderDataset, captioned_files, read_folder
from kdc.data.published import PUBLISHED
from kdc.io import plain
from kdc.paths import as_path

WORLD_COUNT = 2000  # renderings of a world where no count is given


class Renderings(Dataset):
    """Images that are drawn when they are asked for; a subclass says what they show.

    Items: {"image" (3, size, size) in [-1, 1], "caption", "attributes"}. Raises `ValueError` for an
    unknown split.
    """

    # The module whose `render` and `caption` draw and say what `_draw` gives.
    drawn_by: Any

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        count: int = 2000,
        seed: int = 0,
        held_out: bool = False,
    ):
        worlds.stream(0, split, 0, seed)  # an unknown split is refused here
        self.split, self.size, self.count = split, size, count
        self.seed, self.held_out = seed, held_out

    def _draw(self, index: int) -> tuple[Any, np.random.Generator]:
        """What an item shows, and the generator that its rendering goes on with."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.count

    def caption(self, index: int) -> str:
        return self.drawn_by.caption(self._draw(self._checked(index))[0])

    def captions_of(self, index: int) -> tuple[str, ...]:
        """The caption of an item; no image is drawn."""
        return (self.caption(index),)

    def identity(self) -> dict:
        """What the images depend on, in plain values."""
        known = {name: plain(value) for name, value in vars(self).items()}
        return {"drawn_by": self.drawn_by.__name__} | known

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return index

    def __getitem__(self, index: int) -> dict:
        shown, rng = self._draw(self._checked(index))
        image = torch.from_numpy(self.drawn_by.render(shown, rng, self.size)).permute(2, 0, 1)
        said = self.drawn_by.caption(shown)
        return {"image": image.float() / 127.5 - 1, "caption": said, "attributes": shown}


class WorldDataset(Renderings):
    """Renderings of one world or of both in turn."""

    drawn_by = worlds

    def __init__(self, names: Sequence[str], *args, **kwargs):
        self.names = [worlds.world(name).name for name in names]
        super().__init__(*args, **kwargs)

    def _draw(self, index: int) -> tuple[worlds.Attributes, np.random.Generator]:
        name = self.names[index % len(self.names)]
        rng = worlds.rendering_rng(name, self.split, index // len(self.names), self.seed)
        return worlds.draw_attributes(name, rng, self.held_out), rng


class SceneDataset(Renderings):
    """Renderings of scenes of one to three objects, drawn at random."""

    drawn_by = scenes

    def _draw(self, index: int) -> tuple[scenes.Scene, np.random.Generator]:
        rng = scenes.rendering_rng(self.split, index, self.seed)
        return scenes.draw_scene(rng, held_out=self.held_out), rng


def _world_names(source: str | Path) -> list[str]:
    """The worlds that a name stands for; none for any other name."""
    if source == "worlds":
        return list(worlds.WORLDS)
    return [str(source)] if str(source) in worlds.WORLDS else []


def _read_worlds(source, split, size, *, count, seed, held_out, **of_folders) -> WorldDataset:
    if of_folders:
        raise TypeError(f"{', '.join(of_folders)} concern folders of images, not {source!r}")
    return WorldDataset(_world_names(source), split, size, count or WORLD_COUNT, seed, held_out)


def _read_scenes(source, split, size, *, count, seed, held_out, **of_folders) -> SceneDataset:
    if of_folders:
        raise TypeError(f"{', '.join(of_folders)} concern folders of images, not {source!r}")
    return SceneDataset(split, size, count or WORLD_COUNT, seed, held_out)


def _read_folder(source, split, size, *, count, seed, held_out, **of_folders) -> FolderDataset:
    return read_folder(
        as_path(source, "the data set"), split, size, count=count, seed=seed, **of_folders
    )


def _read_published(source, split, size, *, count, seed, held_out, **of_folders) -> FolderDataset:
    found = PUBLISHED[str(source)](split)
    shown = dict(zip(found.files, found.species, strict=True))
    return captioned_files(found.root, shown, size, count=count, seed=seed, **of_folders)


@dataclass(frozen=True)
class Kind:
    """One entry of `DATASETS`."""

    # Whether this kind reads what was given, a name or a path.
    knows: Callable[[str | Path], bool]
    # Called as read(source, split, size, count=, seed=, held_out=, and what else was given). Its
    # items are dictionaries with "image" (3, size, size) in [-1, 1] and "caption", and it has a
    # method `caption(index)`.
    read: Callable[..., Any]


# The first kind that knows a source reads it.
DATASETS: dict[str, Kind] = {
    "worlds": Kind(lambda source: bool(_world_names(source)), _read_worlds),
    "scenes": Kind(lambda source: str(source) == "scenes", _read_scenes),
    "published": Kind(lambda source: str(source) in PUBLISHED, _read_published),
    "folder": Kind(lambda source: as_path(source, "the data set").is_dir(), _read_folder),
}


def load_dataset(
    name_or_folder: str | Path,
    split: str = "train",
    size: int = 64,
    *,
    count: int | None = None,
    seed: int = 0,
    held_out: bool = False,
    **of_folders,
) -> Renderings | FolderDataset:
    """A captioned data set: a procedural world, a published data set, or a folder of images.

    "flora", "lepidoptera" and "worlds" (both) are drawn, and so are "scenes" of several objects;
    "flowers102" and "butterflies" are the paper's, see `published` for where they lie; a folder of
    one of these names is "./flowers102".
    Which kinds there are stands in `DATASETS`. `count` images at most; None: all of a folder, 2,000
    of a world. `held_out` concerns worlds and scenes; `templates`, `crop`, `flip`, `variants` and
    `check` concern folders: see `folders.read_folder`, and `captions` for where captions come from.
    A folder may hold train/ and test/ (or names like these, in any case); where it does not, one
    image in five, chosen by the hash of its name, is for testing.

    Raises `FileNotFoundError` for a missing folder, or a published data set that is neither there
    nor can be fetched (saying which folder to fill with what), `ValueError` for one without images
    or of which several readings are possible, `TypeError` and `ValueError` for arguments that make
    no sense.
    """
    if split not in FOLDER_SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are train and test")
    size, seed = whole_number("size", size, 1), whole_number("seed", seed, 0, MOST_SEEDS)
    count = None if count is None else whole_number("count", count, 1)
    as_path(name_or_folder, "the data set")
    for kind in DATASETS.values():
        if kind.knows(name_or_folder):
            how = {"count": count, "seed": seed, "held_out": held_out}
            return kind.read(name_or_folder, split, size, **how, **of_folders)
    raise FileNotFoundError(
        f"no data set {str(name_or_folder)!r}: neither a folder nor one of "
        f"{', '.join(worlds.WORLDS)}, worlds, {', '.join(PUBLISHED)}"
    )
