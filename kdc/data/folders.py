"""Folders of captioned images: which files are images, what they show, which are for tests."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
FOLDER_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


class FolderDataset(Dataset):
    """Images below a folder, resized and cropped to a square.

    Captions come from `metadata.jsonl` ({"file_name", "text"} a line) where there is one, else from
    the folder an image lies in ("a photo of a tigerlily"). Items: {"image" (3, size, size) in
    [-1, 1], "caption", "path"}.
    """

    def __init__(self, files: Sequence[Path], captions: Sequence[str], size: int = 64):
        self.files, self.captions = list(files), list(captions)
        self.transform = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self.files)

    def caption(self, index: int) -> str:
        return self.captions[index]

    def __getitem__(self, index: int) -> dict:
        with Image.open(self.files[index]) as file:
            upright = ImageOps.exif_transpose(file).convert("RGB")
            image = v2.functional.pil_to_tensor(self.transform(upright))
        return {
            "image": image.float() / 127.5 - 1,
            "caption": self.captions[index],
            "path": str(self.files[index]),
        }


def read_folder(folder: Path, split: str, size: int) -> FolderDataset:
    """The images of one split of a folder; unreadable files are named in a warning.

    Raises `ValueError` where the split has no readable image.
    """
    files = _readable_images(folder, _split_files(folder, split))
    if not files:
        raise ValueError(f"{folder} holds no readable image for the split {split!r}")
    captions = _captions(folder)
    named = [
        captions.get(f.resolve(), f"a photo of {_with_article(_class_name(f))}") for f in files
    ]
    return FolderDataset(files, named, size)


def _with_article(name: str) -> str:
    return f"{'an' if name.startswith(tuple('aeiou')) else 'a'} {name}"


def _class_name(file: Path) -> str:
    splits = {alias for aliases in FOLDER_SPLITS.values() for alias in aliases}
    folder = file.parent.parent if file.parent.name in splits else file.parent
    return folder.resolve().name.replace("_", " ").lower()


def _split_files(folder: Path, split: str) -> list[Path]:
    every = {
        name: [folder / alias for alias in aliases if (folder / alias).is_dir()]
        for name, aliases in FOLDER_SPLITS.items()
    }
    if any(every.values()):
        if not every[split]:
            raise ValueError(f"{folder} has no sub-folder for the split {split!r}")
        return sorted(f for root in every[split] for f in root.rglob("*") if f.is_file())
    files = sorted(f for f in folder.rglob("*") if f.is_file())

    def is_test(file: Path) -> bool:
        digest = hashlib.sha256(file.relative_to(folder).as_posix().encode()).digest()
        return digest[0] % 5 == 0

    test = {f for f in files if is_test(f)} or set(files[-1:])  # few files may miss every fifth
    return [f for f in files if (f in test) == (split == "test")]


def _captions(folder: Path) -> dict[Path, str]:
    captions = {}
    for listing in folder.rglob("metadata.jsonl"):
        for number, line in enumerate(listing.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                name, text = row["file_name"], row["text"]
                if not isinstance(text, str):
                    raise TypeError(f"the text is {text!r}")
                captions[(listing.parent / name).resolve()] = text
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{listing}:{number}: expected {{"file_name": ..., "text": ...}}: {error!r}'
                ) from error
    return captions


def _readable_images(folder: Path, files: list[Path]) -> list[Path]:
    good, bad = [], []
    for file in tqdm(files, desc="checking images", mininterval=2, disable=len(files) < 500):
        if file.name == "metadata.jsonl" or file.name.startswith("."):
            continue
        if file.suffix.lower() not in IMAGES:
            bad.append(f"{file.relative_to(folder)} (not an image file)")
            continue
        try:
            with Image.open(file) as image:
                image.load()
            good.append(file)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            bad.append(f"{file.relative_to(folder)} ({error})")
    if bad:
        shown = "\n  ".join(bad[:20]) + (f"\n  and {len(bad) - 20} more" if len(bad) > 20 else "")
        warnings.warn(f"{folder}: left out {len(bad)} files:\n  {shown}", stacklevel=4)
    return good
