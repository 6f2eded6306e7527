"""Grids of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from studies.figures.colours import WIDTH


def _as_image(image) -> np.ndarray:
    """(3, H, W) uint8, or (3, H, W) float in [-1, 1], to an (H, W, 3) image."""
    array = np.asarray(image)
    if array.dtype != np.uint8:
        array = ((np.clip(array, -1, 1) + 1) * 127.5 + 0.5).astype(np.uint8)
    return array.transpose(1, 2, 0)


def image_grid(
    rows: Mapping[str, Sequence],
    captions: Sequence[str] | None = None,
    scale: float = 1.25,
    title: str | None = None,
) -> Figure:
    """Named rows of images (3, H, W), with a caption above each column.

    `scale`: the side of an image in inches, less where the page is too narrow for it.
    """
    columns = max(len(images) for images in rows.values())
    margin = min(1.2, 0.3 + 0.07 * max(len(line) for name in rows for line in name.split("\n")))
    scale = min(scale, (WIDTH - margin) / columns)
    wrapped = [_wrap(caption, max(8, int(15 * scale))) for caption in captions or ()]
    above = 0.05 + 0.15 * max((text.count("\n") + 1 for text in wrapped), default=0)
    above += 0.25 if title else 0
    width, height = columns * scale + margin, len(rows) * scale + above
    # Placed by hand: a layout that adapts takes half a minute for a hundred images.
    place = {"left": margin / width, "right": 1, "top": 1 - above / height, "bottom": 0}
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(width, height),
        squeeze=False,
        gridspec_kw=place | {"wspace": 0.06, "hspace": 0.06},
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, image in zip(line, images, strict=False):
            axis.imshow(_as_image(image), interpolation="nearest")
        name = name if "\n" in name else _wrap(name, 16)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8, labelpad=6)
    for axis, caption in zip(axes[0], wrapped, strict=False):
        axis.set_title(caption, fontsize=8)
    if title:
        figure.suptitle(title)
    return figure


def _wrap(text: str, width: int) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) + 1 > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])
