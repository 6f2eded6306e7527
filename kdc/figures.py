"""Arrays in, matplotlib figures out. Imports no other module of the library."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import matplotlib
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


STAGES, MID_ROW = 4, 4
SHADES = {"resnets": COLOURS[0], "attentions": COLOURS[1]}


def _place(block: str) -> tuple[float, float, str] | None:
    """Column, row and colour of a block in the drawing of a U-Net; None for what has no place."""
    parts = block.split(".")
    if len(parts) < 3:
        return None
    kind, index = parts[-2], int(parts[-1])
    shade = SHADES.get(kind, COLOURS[5])
    if parts[0] == "mid_block":
        return {"resnets": 6.0 + 2 * index, "attentions": 7.0}[kind], MID_ROW, shade
    going_up = parts[0] == "up_blocks"
    row = STAGES - 1 - int(parts[1]) if going_up else int(parts[1])
    offset = {"resnets": 2 * index, "attentions": 2 * index + 1}.get(kind, 6 if going_up else 4)
    return (9 if going_up else 0) + offset, row, shade


def u_nets(
    kept: Mapping[str, Collection[str]],
    areas: Mapping[str, Mapping[str, float]],
    scale: float = 0.3,
) -> Figure:
    """U-Nets drawn to scale: a square a block, as large as its share of one of the costs.

    `kept` gives each network, a row of the figure, the blocks that it has; `areas` gives each cost,
    a column, the value of every block of the whole network. Blocks that are missing are outlines.
    Rows of squares are stages, outermost on top: the way down at the left, the way up at the right,
    the mid-block below.
    """
    width, height = 16, STAGES + 1
    figure, axes = plt.subplots(
        len(kept),
        len(areas),
        figsize=(width * scale * len(areas) + 1, (height * scale + 0.35) * len(kept) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for column, (cost, values) in enumerate(areas.items()):
        placed = {b: (v, *place) for b, v in values.items() if (place := _place(b))}
        largest = max(value for value, *_ in placed.values())
        for line, (name, blocks) in zip(axes, kept.items(), strict=True):
            axis = line[column]
            for block, (value, x, y, shade) in placed.items():
                side = 0.98 * np.sqrt(value / largest)
                there = block in blocks
                axis.add_patch(
                    plt.Rectangle(
                        (x - side / 2, y - side / 2),
                        side,
                        side,
                        facecolor=shade if there else "none",
                        edgecolor="white" if there else "#b0b0b0",
                        linewidth=0.4 if there else 0.6,
                    )
                )
            axis.set(xlim=(-1, width), ylim=(height - 0.3, -0.7), aspect="equal")
            axis.axis("off")
            share = sum(v for b, v in values.items() if b in blocks) / sum(
                v for _, v in values.items()
            )
            axis.set_title(f"{name}: {share:.0%} of {cost}", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=shade) for shade in (*SHADES.values(), COLOURS[5])]
    labels = ["convolutions", "transformer blocks", "resampling"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def heat_map(table: pd.DataFrame, title: str, log_scale: bool = True) -> Figure:
    """A table as colours, its columns along x, the value written where there is room."""
    figure, axis = plt.subplots(
        figsize=(0.75 * table.shape[1] + 2, 0.28 * len(table) + 1), layout="constrained"
    )
    norm = matplotlib.colors.LogNorm() if log_scale else None
    image = axis.imshow(table.to_numpy(), aspect="auto", cmap="viridis", norm=norm)
    axis.set_yticks(range(len(table)), table.index, fontsize=8)
    axis.set_xticks(range(table.shape[1]), table.columns, fontsize=8)
    axis.set_xlabel(table.columns.name)
    figure.colorbar(image, label=title)
    return figure


def trade_offs(
    rows: pd.DataFrame,
    costs: Mapping[str, str],
    measures: Mapping[str, str],
    control: str = "random",
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """What candidates reach against what they cost: a panel for each measure and cost.

    `rows` has a column `candidate` and one for each cost and measure (their labels are the values).
    Points are means over the rows of a candidate, bars reach from the least to the largest; rows of
    candidates that begin with `control` are small points of their own. `levels` draws a line, such
    as the teacher's, in the panels of a measure.
    """
    figure, axes = plt.subplots(
        len(measures),
        len(costs),
        figsize=(3.3 * len(costs), 2.6 * len(measures) + 0.6),
        squeeze=False,
        sharey="row",
        sharex="col",
        layout="constrained",
    )
    for line, (measure, label) in zip(axes, measures.items(), strict=True):
        for axis, cost in zip(line, costs, strict=True):
            colours, crosses = itertools.cycle(COLOURS), itertools.cycle("x+")
            for candidate, group in rows.groupby("candidate", sort=False):
                x, y = group[cost], group[measure]
                if candidate.startswith(control):
                    axis.plot(x, y, next(crosses), color="#999999", ms=6, label=candidate)
                    continue
                spread = [[y.mean() - y.min()], [y.max() - y.mean()]]
                mark = "D" if candidate.startswith("found") else "o"
                axis.errorbar(
                    [x.mean()],
                    [y.mean()],
                    spread,
                    fmt=mark,
                    color=next(colours),
                    label=candidate,
                )
            if levels and measure in levels:
                axis.axhline(levels[measure], color=COLOURS[5], lw=0.8, ls=":", label="teacher")
            axis.grid(alpha=0.3)
        line[0].set_ylabel(label)
    for axis, label in zip(axes[-1], costs.values(), strict=True):
        axis.set_xlabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named, loc="outside lower center", ncols=5, fontsize=8)
    return figure
