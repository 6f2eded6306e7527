"""The paper's two data sets by name: Oxford Flowers 102, and Butterflies & Moths 100 Species.

Both lie below `data_folder()`. Flowers are fetched there by torchvision where the network allows
it; the butterflies are on a site that asks for an account, so they are never fetched. Where one is
missing, the error names the folder to fill and what belongs there.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import Flowers102

from kdc.paths import as_path

VARIABLE = "KDC_DATA"  # of the environment: where data sets lie
FLOWERS, BUTTERFLIES = "flowers102", "butterflies"
BUTTERFLY_PAGE = "https://www.kaggle.com/datasets/gpiosenka/butterfly-images40-species"


@dataclass(frozen=True)
class Listing:
    """The images of one split of a data set, before any is read."""

    # The folder that names in messages are relative to.
    root: Path
    # The image files, and the species that each shows.
    files: Sequence[Path]
    species: Sequence[str]


def data_folder() -> Path:
    """Where data sets with a name lie: the environment's `KDC_DATA`, or a folder in ~/.cache."""
    return as_path(os.environ.get(VARIABLE) or "~/.cache/kdc/data", VARIABLE)


def flower_files(split: str) -> Listing:
    """Oxford Flowers 102 (Nilsback and Zisserman 2008) by torchvision's class and splits.

    "train" are its train and val together, 20 images of each species, "test" the other 6,149.
    Raises `FileNotFoundError` where it is neither there nor to be had.
    """
    root = data_folder()
    place = root / "flowers-102"
    parts = {"train": ("train", "val"), "test": ("test",)}[split]
    try:
        found = [Flowers102(root, split=part) for part in parts]
    except RuntimeError:
        found = _fetched_flowers(root, place, parts)
    files = [Path(file) for part in found for file in part._image_files]
    species = [Flowers102.classes[label] for part in found for label in part._labels]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{place} lacks {len(missing)} of the {len(files)} images for the split {split!r}, "
            f"{missing[0].name} for one: unpack 102flowers.tgz there once more"
        )
    return Listing(root, files, species)


def _fetched_flowers(root: Path, place: Path, parts: Sequence[str]) -> list[Flowers102]:
    try:
        return [Flowers102(root, split=part, download=True) for part in parts]
    except Exception as error:  # whatever the network and the archive make torchvision raise
        page = Flowers102._download_url_prefix
        raise FileNotFoundError(
            f"no Oxford Flowers 102 in {place}, and it could not be fetched ({error}). Fetch from "
            f"{page} the files 102flowers.tgz, imagelabels.mat and setid.mat; put the two .mat "
            f"files into {place} and unpack the archive there, which makes jpg/. For another "
            f"folder set {VARIABLE}"
        ) from error


def butterfly_files(split: str) -> Listing:
    """Butterflies & Moths 100 Species: train/, valid/ and test/SPECIES/*.jpg, and a list as CSV.

    "train" is its train, "test" its valid and test together. The list's `labels` say which species
    a file of its `filepaths` shows; a file that it does not name is called after its folder.
    Raises `FileNotFoundError` where the folder is not there, and `ValueError` for a list that
    cannot be read or names files that are missing.
    """
    root = data_folder() / BUTTERFLIES
    names = {"train": ("train",), "test": ("valid", "test")}[split]
    if not all((root / name).is_dir() for name in names):
        raise FileNotFoundError(
            f"no Butterflies & Moths in {root}: fetch the archive from {BUTTERFLY_PAGE} (it asks "
            f"for an account), and unpack it so that {root} holds train/, valid/ and test/ with a "
            f"folder a species in each, and the list as a CSV. For another folder set {VARIABLE}"
        )
    listed = _butterfly_list(root)
    files = sorted(file for name in names for file in (root / name).glob("*/*") if _is_jpeg(file))
    here = {file.relative_to(root).as_posix() for file in files}
    if missing := [name for name in listed if name.split("/")[0] in names and name not in here]:
        raise ValueError(
            f"{root} lacks {len(missing)} of the images that its list names, {missing[0]!r} for "
            "one: unpack the archive once more"
        )
    species = [
        listed.get(file.relative_to(root).as_posix(), file.parent.name).strip().lower()
        for file in files
    ]
    return Listing(root, files, species)


def _is_jpeg(file: Path) -> bool:
    return file.suffix.lower() in (".jpg", ".jpeg") and not file.name.startswith(".")


def _butterfly_list(root: Path) -> dict[str, str]:
    """{file, relative to the folder: species} of the CSV with columns filepaths and labels."""
    for file in sorted(root.glob("*.csv")):
        with open(file, newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened, strict=True)
            if not {"filepaths", "labels"} <= set(reader.fieldnames or ()):
                continue
            try:
                rows = [(row["filepaths"], row["labels"]) for row in reader]
            except csv.Error as error:
                raise ValueError(f"{file}:{reader.line_num}: {error}") from error
        for number, (path, label) in enumerate(rows, 2):
            if not path or not label:
                raise ValueError(f"{file}:{number}: filepaths and labels must not be empty")
        return {path.strip().replace("\\", "/"): label for path, label in rows}
    warnings.warn(
        f"{root} holds no CSV with columns filepaths and labels: species are called after their "
        "folders, and a missing image is not noticed",
        stacklevel=5,
    )
    return {}


# The data sets that `load_dataset` knows by name: how each lists the files of a split.
PUBLISHED: dict[str, Callable[[str], Listing]] = {
    FLOWERS: flower_files,
    BUTTERFLIES: butterfly_files,
}
