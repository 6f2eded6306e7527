"""Arrays in, matplotlib figures out. Imports no other module of the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

COLOURS = ("#33658a", "#c8553d", "#588b5b", "#8e5aa8", "#d99b2b", "#4a4a4a", "#c76f9b")


def _as_image(picture) -> np.ndarray:
    """(3, H, W) uint8, or (3, H, W) float in [-1, 1], to an (H, W, 3) image."""
    array = np.asarray(picture)
    if array.dtype != np.uint8:
        array = ((np.clip(array, -1, 1) + 1) * 127.5 + 0.5).astype(np.uint8)
    return array.transpose(1, 2, 0)


def picture_grid(
    rows: Mapping[str, Sequence],
    captions: Sequence[str] | None = None,
    scale: float = 1.25,
    title: str | None = None,
) -> Figure:
    """Named rows of pictures (3, H, W), with a caption above each column."""
    columns = max(len(pictures) for pictures in rows.values())
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(columns * scale + 1.2, len(rows) * scale + (0.5 if captions else 0.1)),
        squeeze=False,
        layout="constrained",
    )
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(_as_image(picture), interpolation="nearest")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    for axis, caption in zip(axes[0], captions or (), strict=False):
        axis.set_title(_wrap(caption, 16), fontsize=7)
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


def curves(
    logs: Mapping[str, pd.DataFrame | Sequence[pd.DataFrame]],
    terms: Sequence[str],
    smooth: int = 1,
    log_scale: bool = True,
) -> Figure:
    """One panel a term, one line a run; several logs of a run become a mean with its range."""
    figure, axes = plt.subplots(
        1, len(terms), figsize=(3.1 * len(terms), 2.7), squeeze=False, layout="constrained"
    )
    for axis, term in zip(axes[0], terms, strict=True):
        for (name, runs), colour in zip(logs.items(), COLOURS * 3, strict=False):
            runs = [runs] if isinstance(runs, pd.DataFrame) else runs
            lines = [r.set_index("step")[term] for r in runs if term in r]
            if not lines:
                continue
            table = pd.concat(lines, axis=1).rolling(smooth, min_periods=1).mean()
            axis.plot(table.index, table.mean(axis=1), color=colour, label=name, lw=1.5)
            if table.shape[1] > 1:
                low, high = table.min(axis=1), table.max(axis=1)
                axis.fill_between(table.index, low, high, color=colour, alpha=0.2, lw=0)
        axis.set(title=term, xlabel="step")
        if log_scale and axis.lines:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    if len(logs) > 1:
        handles, labels = max(
            (a.get_legend_handles_labels() for a in axes[0]), key=lambda x: len(x[0])
        )
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(4, len(logs)), fontsize=8
        )
    return figure


def bars(
    values: Mapping[str, Mapping[str, float]],
    ylabel: str,
    log_scale: bool = False,
    errors: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Groups of bars: {group: {bar: value}}, the bars of one name in one colour."""
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    figure, axis = plt.subplots(
        figsize=(max(4.5, 0.45 * len(names) * len(values) + 2), 3), layout="constrained"
    )
    width = 0.8 / len(names)
    for index, (name, colour) in enumerate(zip(names, COLOURS * 3, strict=False)):
        heights = [group.get(name, np.nan) for group in values.values()]
        error = [errors[g].get(name, 0) for g in values] if errors else None
        places = np.arange(len(values)) + (index - (len(names) - 1) / 2) * width
        axis.bar(places, heights, width * 0.92, color=colour, label=name, yerr=error)
    axis.set_xticks(range(len(values)), list(values))
    axis.set_ylabel(ylabel)
    if log_scale:
        axis.set_yscale("log")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    if len(names) > 1:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
