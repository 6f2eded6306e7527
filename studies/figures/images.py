"""Grids of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure


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
    """Named rows of images (3, H, W), with a caption above each column."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(columns * scale + 1.2, len(rows) * scale + (0.5 if captions else 0.1)),
        squeeze=False,
        layout="constrained",
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, image in zip(line, images, strict=False):
            axis.imshow(_as_image(image), interpolation="nearest")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    for axis, caption in zip(axes[0], captions or (), strict=False):
        axis.set_title(_wrap(caption, max(10, int(13 * scale))), fontsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
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
