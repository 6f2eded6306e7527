"""U-Nets drawn to scale: arrays in, a matplotlib figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from studies.figures.colours import COLOURS
from studies.figures.colours import WIDTH as COLUMN

STAGES = 4
WAY_UP = 6  # the column at which the way up begins
WIDTH, HEIGHT = WAY_UP + 7, STAGES + 1  # in columns and rows of unit squares
SHADES = {"resnets": COLOURS[0], "attentions": COLOURS[1]}
LABELS = ("convolutions", "transformer blocks", "resampling", "left out")
REMOVED = "#9a9a9a"


def _place(block: str) -> tuple[float, float, str] | None:
    """Column, row and colour of a block in the drawing of a U-Net; None for what has no place."""
    parts = block.split(".")
    if len(parts) < 3:
        return None
    kind, index = parts[-2], int(parts[-1])
    shade = SHADES.get(kind, COLOURS[5])
    if parts[0] == "mid_block":
        return {"resnets": WAY_UP - 2.0 + 2 * index, "attentions": WAY_UP - 1.0}[kind], 4, shade
    going_up = parts[0] == "up_blocks"
    row = STAGES - 1 - int(parts[1]) if going_up else int(parts[1])
    offset = {"resnets": 2 * index, "attentions": 2 * index + 1}.get(kind, 6 if going_up else 4)
    return (WAY_UP if going_up else 0) + offset, row, shade


def u_nets(
    costs: Mapping[str, pd.DataFrame], rows: Sequence[str] = (), width: float = COLUMN
) -> Figure:
    """U-Nets drawn to scale: a square a block, as large as its share of one of the costs.

    `costs` gives each cost, a column of the figure, a table: blocks by the teacher's names as rows,
    networks as columns, the whole one first. What a network has no value for (NaN) is an outline as
    large as in the whole one. Rows of squares are stages, outermost on top, with `rows` as labels:
    the way down at the left, the way up at the right, the mid-block below. Titles give the share of
    the whole network's cost, in which blocks without a place (such as "conv_in") count as well.
    `width` is in inches.
    """
    names = next(iter(costs.values())).columns
    margin = 2.0 if rows else 0.0
    unit = width / (len(costs) * WIDTH + margin)
    figure, axes = plt.subplots(
        len(names),
        len(costs),
        figsize=(width, (HEIGHT * unit + 0.3) * len(names) + 0.4),
        squeeze=False,
        width_ratios=[WIDTH + margin] + [WIDTH] * (len(costs) - 1),
        layout="constrained",
    )
    for column, (cost, table) in enumerate(costs.items()):
        whole = table.iloc[:, 0]
        placed = {b: place for b in table.index if (place := _place(b))}
        largest = table.loc[list(placed)].max(axis=None)
        for axis, name in zip(axes[:, column], names, strict=True):
            for block, (x, y, shade) in placed.items():
                value = table.loc[block, name]
                missing = np.isnan(value)
                side = 0.93 * np.sqrt((whole[block] if missing else value) / largest)
                style = {"facecolor": "none", "edgecolor": REMOVED, "linewidth": 0.7}
                style = style if missing else {"facecolor": shade, "edgecolor": "none"}
                corner = (x - side / 2, y - side / 2)
                axis.add_patch(plt.Rectangle(corner, side, side, **style))
            left = 0.0 if column else margin
            axis.set(xlim=(-0.6 - left, WIDTH - 0.4), ylim=(HEIGHT - 0.45, -0.55), aspect="equal")
            axis.axis("off")
            share = table[name].sum() / whole.sum()
            axis.set_title(f"{name}: {share:.0%} of the {cost}", fontsize=8.5)
            for row, label in enumerate(() if column else rows):
                axis.text(-0.75, row, label, fontsize=8, ha="right", va="center", color=COLOURS[5])
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (*SHADES.values(), COLOURS[5])]
    handles.append(plt.Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=REMOVED))
    figure.legend(handles, LABELS, loc="outside lower center", ncols=4, fontsize=8)
    return figure
