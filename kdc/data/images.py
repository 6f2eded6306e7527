"""The one reader of image files, for the check of a folder and for training alike."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

# Photographs and drawings; what else Pillow opens (PDF, EPS, icons, plots of science) is no image.
FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA",
)  # fmt: skip


@functools.cache
def readable() -> tuple[str, ...]:
    """The `FORMATS` that Pillow can open here."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes of image files, in lower case, that Pillow reads here."""
    known = Image.registered_extensions()
    return frozenset(s for s, kind in known.items() if kind in readable())


def read_image(file: str | os.PathLike, size: int | None = None) -> Image.Image:
    """An image file, upright, as RGB; of animations the first frame.

    16-bit files are scaled to 8 bits; transparent ones lie on white. Where `size` is given, JPEG
    photographs are decoded at a fraction of their size, at least twice `size` a side, which is many
    times as fast. An EXIF block that cannot be read says nothing about which side is up.

    Raises `ValueError` naming the file for whatever is no image of `FORMATS`, is cut off, too large
    to be safe (`PIL.Image.MAX_IMAGE_PIXELS`), or holds numbers that are no colours.
    """
    try:
        with Image.open(file, formats=readable()) as opened:
            if size is not None and opened.format in ("JPEG", "MPO"):
                opened.draft(None, (2 * size, 2 * size))
            opened.load()
            return _rgb(_upright(opened))
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        raise ValueError(f"{file}: {error or type(error).__name__}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block; the image itself was decoded
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError(f"values from {values.min()} to {values.max()}, not of 16 bits")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point numbers, whose white is not known: convert it to 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@functools.lru_cache(maxsize=200_000)
def _why_unreadable(file: str, size: int, bytes_: int, modified: int) -> str | None:
    """Remembered for a file as it is now, so that a second look costs nothing."""
    try:
        read_image(file, size)
    except (OSError, ValueError) as error:
        return str(error).removeprefix(f"{file}: ")
    return None


def unreadable(files: Sequence[Path], size: int) -> dict[Path, str]:
    """The files that `read_image` does not read at that size, and why, in their order.

    All are read, in as many threads as there are processors.
    """

    def look(file: Path) -> str | None:
        found = file.stat()
        return _why_unreadable(str(file), size, found.st_size, found.st_mtime_ns)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = tqdm(
            pool.map(look, files),
            total=len(files),
            desc="checking images",
            mininterval=2,
            disable=len(files) < 500,
        )
        return {file: why for file, why in zip(files, reasons, strict=True) if why}
