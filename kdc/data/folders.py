"""Folders of captioned images: which files are images, what they show, which are for tests."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from kdc.checks import as_texts, whole_number
from kdc.data.captions import LISTS, read_captions
from kdc.data.images import read_image, suffixes, unreadable
from kdc.io import checksum, hash_text

FOLDER_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation", "eval"),
}
SPLITS = tuple(FOLDER_SPLITS)
SPLIT_OF = {alias: split for split, aliases in FOLDER_SPLITS.items() for alias in aliases}
# Folders that systems and programs leave behind, in lower case; hidden ones are skipped as well.
RUBBISH = {
    "__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip
RUBBISH_FILES = {"thumbs.db", "desktop.ini"}
TEMPLATES = ("a photo of {}",)


class FolderDataset(Dataset):
    """Images below a folder, resized and cropped to a square.

    Items: {"image" (3, size, size) in [-1, 1], "caption" the first of its captions, "captions" all
    of them, "path"}. With `variants` above 1 each image is there so often, one after all others
    have had their turn; `crop` "random" and `flip` draw for each variant from `seed` and the item's
    number alone.
    """

    def __init__(
        self,
        files: Sequence[Path],
        captions: Sequence[str | Sequence[str]],
        size: int = 64,
        *,
        crop: str = "center",
        flip: bool = False,
        variants: int = 1,
        seed: int = 0,
        root: Path | None = None,
    ):
        if crop not in ("center", "random"):
            raise ValueError(f"crop must be center or random, not {crop!r}")
        if not isinstance(flip, bool):
            raise TypeError(f"flip must be True or False, not {flip!r}")
        if len(captions) != len(files):
            raise ValueError(f"{len(captions)} captions for {len(files)} images")
        self.files = list(files)
        self.captions = [(c,) if isinstance(c, str) else tuple(c) for c in captions]
        self.size, self.crop, self.flip = size, crop, flip
        self.variants, self.seed = whole_number("variants", variants, 1), seed
        self.root = root

    def __len__(self) -> int:
        return len(self.files) * self.variants

    def caption(self, index: int) -> str:
        return self.captions_of(index)[0]

    def captions_of(self, index: int) -> tuple[str, ...]:
        """All captions of an item; no image is read."""
        return self.captions[index % len(self.files)]

    def identity(self) -> dict:
        """What the images depend on, in plain values: names, sizes and times of the files too.

        Names are relative to the folder, which may be moved.
        """
        found = []
        for file in self.files:
            known = file.stat()
            name = file.relative_to(self.root) if self.root else file
            found.append((name.as_posix(), known.st_size, known.st_mtime_ns))
        how = {"size": self.size, "crop": self.crop, "flip": self.flip}
        return how | {"variants": self.variants, "seed": self.seed, "files": hash_text(repr(found))}

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = index % len(self.files)
        image = read_image(self.files[place], self.size)
        pixels = v2.functional.pil_to_tensor(v2.functional.resize(image, self.size, antialias=True))
        pixels = self._cropped(pixels, torch.Generator().manual_seed(self.seed * 1_000_003 + index))
        return {
            "image": pixels.float() / 127.5 - 1,
            "caption": self.captions[place][0],
            "captions": self.captions[place],
            "path": str(self.files[place]),
        }

    def _cropped(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        where, side = torch.rand(3, generator=generator).tolist(), self.size
        if self.crop == "random":
            free = pixels.shape[-2] - side, pixels.shape[-1] - side
            top, left = (int(w * (f + 1)) for w, f in zip(where[:2], free, strict=True))
            pixels = pixels[:, top : top + side, left : left + side]
        else:
            pixels = v2.functional.center_crop(pixels, [side, side])
        return pixels.flip(-1) if self.flip and where[2] < 0.5 else pixels


def read_folder(
    folder: Path,
    split: str,
    size: int,
    *,
    count: int | None = None,
    seed: int = 0,
    templates: Sequence[str] = TEMPLATES,
    check: bool = True,
    **augmentation,
) -> FolderDataset:
    """The images of one split of a folder.

    `count` takes so many of them, in turn from each class, always the same. Captions come from
    lists and texts where there are any (see `captions`), else from the class folder an image lies
    in, in each of the `templates`. With `check` every file is read once, in threads: those that
    cannot be read, and files that are no images, are left out and named in a warning; without, such
    a file raises when its turn comes. `augmentation` are `crop`, `flip`, `variants` of
    `FolderDataset`. Warns where an image is both for training and for tests.

    Raises `ValueError` where the split has no image, where the sub-folders can be read in several
    ways, and for captions that cannot be given to an image; `PermissionError` for a folder that may
    not be read.
    """
    check_templates(templates)
    files = list(walk(folder))
    images = [f for f in files if f.suffix.lower() in suffixes()]
    tops = _split_folders(folder, images)
    splits = _divided(folder, images, tops)
    if not splits[split]:
        if tops:
            seen = ", ".join(sorted(top.name for top in tops))
            raise ValueError(f"{folder} has no sub-folder for the split {split!r}, only {seen}")
        raise ValueError(f"{folder} holds no readable image for the split {split!r}")
    _warn_of_twins(folder, splits)
    known = read_captions(folder, images, files)
    others = {f: "not an image file" for f in _others(folder, files, images, tops, split)}
    return captioned_files(
        folder,
        {f: _class_name(folder, f, tops) for f in splits[split]},
        size,
        groups={f: f.parent for f in splits[split]},
        known=known,
        wrong=others,
        count=count,
        seed=seed,
        templates=templates,
        check=check,
        **augmentation,
    )


def check_templates(templates: Sequence[str]) -> None:
    """Raise `ValueError` for a template without a place for the class."""
    for template in as_texts("templates", templates) or [""]:
        if template.count("{}") != 1:
            raise ValueError(f"a template must hold one {{}} for the class, not {template!r}")


def captioned_files(
    folder: Path,
    classes: Mapping[Path, str],
    size: int,
    *,
    groups: Mapping[Path, object] | None = None,
    known: Mapping[Path, Sequence[str]] | None = None,
    wrong: Mapping[Path, str] | None = None,
    count: int | None = None,
    seed: int = 0,
    templates: Sequence[str] = TEMPLATES,
    check: bool = True,
    **augmentation,
) -> FolderDataset:
    """A data set of image files below `folder`, {file: what it shows}; see `read_folder`.

    `groups` says from which files `count` are taken in turn (default: the classes), `known` the
    captions of some, and `wrong` which other files are named in the warning, and why.
    """
    check_templates(templates)
    chosen, wrong = list(classes), dict(wrong or {})
    if count is not None:
        chosen = _in_turn(folder, groups or classes, count)
    if check:
        wrong |= unreadable(chosen, size)
        chosen = [f for f in chosen if f not in wrong]
        _warn_of(folder, wrong)
    if not chosen:
        raise ValueError(f"{folder} holds no readable image for this split")
    captions = [
        (known or {}).get(f)
        or [t.format(with_article(classes[f])) for t in as_texts("templates", templates)]
        for f in chosen
    ]
    return FolderDataset(chosen, captions, size, seed=seed, root=folder, **augmentation)


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, by name, links followed and each file once.

    Hidden ones and what systems leave behind are passed over. Raises `PermissionError` naming a
    folder that may not be read.
    """

    def refuse(error: OSError):
        raise PermissionError(f"{error.filename} cannot be read: {error.strerror}") from error

    folders, files = set(), set()
    for place, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in folders:
            below.clear()  # a link to where we have been
            continue
        folders.add(real)
        below[:] = sorted(b for b in below if not b.startswith(".") and b.lower() not in RUBBISH)
        for name in sorted(names):
            file = Path(place, name)
            if name.startswith(".") or name.lower() in RUBBISH_FILES or not file.is_file():
                continue
            if (target := os.path.realpath(file)) not in files:
                files.add(target)
                yield file


def _top(folder: Path, file: Path) -> Path | None:
    """The sub-folder of `folder` that a file lies in, None for one right in it."""
    parts = file.relative_to(folder).parts
    return folder / parts[0] if len(parts) > 1 else None


def _split_folders(folder: Path, images: Sequence[Path]) -> dict[Path, str]:
    """The sub-folders that are splits, and which; none where all of them are classes.

    Raises `ValueError` where that can be read in several ways.
    """
    tops = {_top(folder, image) for image in images}
    empty = {p for p in folder.iterdir() if p.is_dir() and p.name.lower() in SPLIT_OF}
    named = {top: SPLIT_OF[top.name.lower()] for top in tops | empty if top is not None
             and top.name.lower() in SPLIT_OF}  # fmt: skip
    others = sorted("images right in it" if t is None else t.name for t in tops - set(named))
    twice = [top.name for top, split in named.items() if split == "train"]
    if len(twice) > 1:
        raise ValueError(f"{folder} has several folders for training, {sorted(twice)}: keep one")
    if not named or not others:
        return named
    raise ValueError(
        f"{folder} holds {', '.join(sorted(top.name for top in named))} and also "
        f"{', '.join(others[:5])}: the former may be splits or classes. Move everything into train/"
        " and test/, or rename the classes"
    )


def _divided(folder: Path, images: list[Path], tops: dict[Path, str]) -> dict[str, list[Path]]:
    if tops:
        named = {i: tops[_top(folder, i)] for i in images}
        return {split: sorted(i for i in images if named[i] == split) for split in SPLITS}
    images = sorted(images)
    test = {i for i in images if _digest(folder, i)[0] % 5 == 0}
    test = test or set(images[-1:])  # few images may miss every fifth
    return {split: [i for i in images if (i in test) == (split == "test")] for split in SPLITS}


def _digest(folder: Path, file: Path) -> bytes:
    return hashlib.sha256(file.relative_to(folder).as_posix().encode()).digest()


def _in_turn(folder: Path, groups: Mapping[Path, object], count: int) -> list[Path]:
    """`count` of the images, in turn from each group, and by the hash of their names within it."""
    members: dict[object, list[Path]] = {}
    for image, group in groups.items():
        members.setdefault(group, []).append(image)
    for images in members.values():
        images.sort(key=lambda image: _digest(folder, image))
    rounds = max(map(len, members.values()))
    order = [m[i] for i in range(rounds) for m in members.values() if i < len(m)]
    return sorted(order[:count])


def _others(folder, files, images, tops, split) -> list[Path]:
    """Files of this split that are neither images nor captions."""
    stems = {i.with_suffix("") for i in images} | set(images)
    return [
        f
        for f in files
        if f.suffix.lower() not in suffixes()
        and f.name.lower() not in LISTS
        and not (f.suffix.lower() == ".txt" and f.with_suffix("") in stems)
        and (not tops or tops.get(_top(folder, f), split) == split)
    ]


def _warn_of(folder: Path, wrong: dict[Path, str]) -> None:
    if wrong:
        lines = [f"{file.relative_to(folder)} ({why})" for file, why in wrong.items()]
        shown = "\n  ".join(lines[:20]) + (f"\n  and {len(lines) - 20} more" if lines[20:] else "")
        warnings.warn(f"{folder}: left out {len(wrong)} files:\n  {shown}", stacklevel=5)


def _warn_of_twins(folder: Path, splits: dict[str, list[Path]]) -> None:
    """Warn of files that are the same, byte for byte, for training and for tests."""
    sizes = [{i.stat().st_size for i in splits[split]} for split in SPLITS]
    shared = sizes[0] & sizes[1]
    sums = {
        split: {checksum(i): i for i in splits[split] if i.stat().st_size in shared}
        for split in SPLITS
    }
    twins = [(sums["train"][s], sums["test"][s]) for s in sums["train"] if s in sums["test"]]
    if twins:
        pairs = [" = ".join(str(i.relative_to(folder)) for i in pair) for pair in twins]
        shown = "\n  ".join(pairs[:5]) + (f"\n  and {len(pairs) - 5} more" if pairs[5:] else "")
        warnings.warn(
            f"{folder}: {len(twins)} images are both for training and for tests, so scores on the "
            f"latter are too good:\n  {shown}",
            stacklevel=5,
        )


def with_article(name: str) -> str:
    """ "a rose", "an iris"."""
    return f"{'an' if name.startswith(tuple('aeiou')) else 'a'} {name}"


def _class_name(folder: Path, file: Path, tops: dict[Path, str]) -> str:
    """The folder an image lies in; the data set's own name right in it or right in a split."""
    parent = folder if file.parent in tops else file.parent
    return parent.resolve().name.replace("_", " ").lower()
