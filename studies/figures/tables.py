"""Tables as bars, dots, colours and trade-offs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from studies.figures.colours import COLOURS


def spread_bars(draws: Mapping[str, pd.DataFrame], xlabel: str, log_scale: bool = True) -> Figure:
    """Groups of horizontal bars: tables of rows by draws, a group a row, a bar a table.

    Bars are means over draws, their ends reach from the least to the largest draw. Rows are in the
    order of the first table's, the last one on top.
    """
    rows = next(iter(draws.values())).index
    figure, axis = plt.subplots(figsize=(7.5, 0.36 * len(rows) + 1.1), layout="constrained")
    height = 0.8 / len(draws)
    for index, (name, table) in enumerate(draws.items()):
        table = table.loc[rows]
        mean = table.mean(axis=1)
        places = np.arange(len(rows)) + ((len(draws) - 1) / 2 - index) * height
        ends = [mean - table.min(axis=1), table.max(axis=1) - mean]
        axis.barh(places, mean, height * 0.92, color=COLOURS[index], label=name, xerr=ends)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.set_xlabel(xlabel)
    axis.set_xscale("log" if log_scale else "linear")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=len(draws), fontsize=8)
    return figure


def dots(
    table: pd.DataFrame,
    xlabel: str,
    spread: Mapping[str, tuple[pd.Series, pd.Series]] | None = None,
    log_scale: bool = False,
) -> Figure:
    """A line for each row of the table, on it a dot for each column.

    `spread` gives a column the lower and upper ends of bars, in the order of the rows.
    """
    figure, axis = plt.subplots(figsize=(7.5, 0.27 * len(table) + 1.1), layout="constrained")
    places = np.arange(len(table))
    for (name, values), colour, mark in zip(
        table.items(), COLOURS * 3, itertools.cycle("osD^v"), strict=False
    ):
        bars = None
        if spread and name in spread:
            low, high = (np.asarray(end, dtype=float) for end in spread[name])
            bars = np.clip([values - low, high - values], 0, None)
        axis.errorbar(values, places, xerr=bars, fmt=mark, ms=5, color=colour, label=name)
    axis.set_yticks(places, table.index, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel(xlabel)
    axis.set_xscale("log" if log_scale else "linear")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=min(4, table.shape[1]), fontsize=8)
    return figure


def heat_map(tables: Mapping[str, pd.DataFrame], label: str, log_scale: bool = True) -> Figure:
    """Tables with the same rows as colours on one scale, side by side, their columns along x."""
    rows, widest = (max(table.shape[i] for table in tables.values()) for i in (0, 1))
    least = 3.0 if len(tables) < 4 else 1.5
    figure, axes = plt.subplots(
        1,
        len(tables),
        figsize=(max(least, 0.42 * widest) * len(tables) + 2.3, 0.27 * rows + 1.3),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    values = np.concatenate([table.to_numpy().ravel() for table in tables.values()])
    scale = matplotlib.colors.LogNorm if log_scale else matplotlib.colors.Normalize
    norm = scale(np.nanmin(values), np.nanmax(values))
    for axis, (title, table) in zip(axes[0], tables.items(), strict=True):
        image = axis.imshow(table.to_numpy(), aspect="auto", cmap="viridis", norm=norm)
        axis.set_yticks(range(len(table)), table.index, fontsize=9)
        texts = [str(name) for name in table.columns]
        turn = 90 if sum(map(len, texts)) > 5 * len(texts) else 0  # else they would touch
        axis.set_xticks(range(len(texts)), texts, fontsize=8, rotation=turn)
        axis.set_xlabel(table.columns.name)
        axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label=label)
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
    candidates that begin with `control` are small crosses of their own. A candidate "family: name"
    has the mark of its family and the colour of its name. `levels` draws a line, such as the
    teacher's, in the panels of a measure.
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
    families = {name.partition(": ")[0] for name in rows["candidate"] if ": " in name}
    marks = dict(zip(sorted(families - {control}), "D^sv", strict=False))
    wanted = [name.rpartition(": ")[2] for name in dict.fromkeys(rows["candidate"])]
    shades = dict(zip(dict.fromkeys(wanted), COLOURS * 3, strict=False))
    for line, (measure, label) in zip(axes, measures.items(), strict=True):
        for axis, cost in zip(line, costs, strict=True):
            crosses = itertools.cycle("x+")
            for candidate, group in rows.groupby("candidate", sort=False):
                x, y = group[cost], group[measure]
                family, _, name = candidate.rpartition(": ")
                if candidate.startswith(control):
                    axis.plot(x, y, next(crosses), color="#999999", ms=6, label=candidate)
                    continue
                axis.errorbar(
                    [x.mean()],
                    [y.mean()],
                    [[y.mean() - y.min()], [y.max() - y.mean()]],
                    fmt=marks.get(family, "o"),
                    color=shades[name],
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
