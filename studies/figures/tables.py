"""Tables as bars, dots, colours and trade-offs."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Collection, Mapping

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from studies.figures.colours import COLOURS, HATCHES, WIDTH, looks


def spread_bars(draws: Mapping[str, pd.DataFrame], xlabel: str, log_scale: bool = True) -> Figure:
    """Groups of horizontal bars: tables of rows by draws, a group a row, a bar a table.

    Bars are means over draws, their ends reach from the least to the largest draw. Rows are in the
    order of the first table's, the last one on top.
    """
    rows = next(iter(draws.values())).index
    figure, axis = plt.subplots(figsize=(WIDTH, 0.36 * len(rows) + 1.1), layout="constrained")
    height = 0.8 / len(draws)
    for index, (name, table) in enumerate(draws.items()):
        table = table.loc[rows]
        mean = table.mean(axis=1)
        places = np.arange(len(rows)) + ((len(draws) - 1) / 2 - index) * height
        ends = [mean - table.min(axis=1), table.max(axis=1) - mean]
        style = {"color": COLOURS[index], "hatch": HATCHES[index], "edgecolor": "white"}
        axis.barh(places, mean, height * 0.92, label=name, xerr=ends, ecolor="black", **style)
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
    figure, axis = plt.subplots(figsize=(WIDTH, 0.27 * len(table) + 1.1), layout="constrained")
    places = np.arange(len(table))
    for (name, values), (colour, _, mark, _) in zip(
        table.items(), looks(table.shape[1]), strict=True
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


OUTCOMES = {  # of a claim: colour and mark
    "holds": (COLOURS[0], "o"),
    "refuted": (COLOURS[1], "X"),
    "open": (COLOURS[5], "D"),
}


def forest(
    checked: pd.DataFrame, higher_is_better: Callable[[str], bool], names: Mapping[str, str] = {}
) -> Figure:
    """Differences with their intervals: a line for each comparison, a panel for each measure.

    `checked` is what `claims.check` gives: "claim", "candidate", "baseline", "measure", "mean",
    "low", "high", "adjusted" and "outcome". The mark says what came of the claim, and is filled
    where the difference is significant among all of its family. A claim is written once, over its
    comparisons. `names` are what measures are called; below each axis stands where better is.
    """
    measures = list(dict.fromkeys(checked["measure"]))
    compared = ["claim", "candidate", "baseline"]
    lines = list(dict.fromkeys(checked[compared].itertuples(index=False, name=None)))
    texts, before = [], None
    for claim, candidate, baseline in lines:
        head = "" if claim == before else textwrap.fill(claim, 56) + "\n"
        texts.append(head + textwrap.fill(f"{candidate} \N{MINUS SIGN} {baseline}", 56))
        before = claim
    rows = [1.1 + 0.95 * text.count("\n") for text in texts]
    ends = np.cumsum(rows)
    places = dict(zip(lines, ends - np.array(rows) / 2, strict=True))
    figure, axes = plt.subplots(
        1,
        len(measures),
        figsize=(WIDTH, 0.145 * ends[-1] + 1.0),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, measure in zip(axes.flat, measures, strict=True):
        for row in checked[checked["measure"] == measure].to_dict("records"):
            colour, mark = OUTCOMES[row["outcome"]]
            filled = colour if row["adjusted"] < 0.05 else "white"
            style = {"color": colour, "fmt": mark, "mfc": filled, "ms": 5}
            off = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
            place = places[tuple(row[name] for name in compared)]
            axis.errorbar([row["mean"]], [place], xerr=off, **style)
        axis.axvline(0, color="#767676", lw=0.8)
        for end in ends[:-1]:
            axis.axhline(end, color="#dddddd", lw=0.5)
        better = "better \N{RIGHTWARDS ARROW}"
        better = better if higher_is_better(measure) else "\N{LEFTWARDS ARROW} better"
        axis.set(title=names.get(measure, measure.replace("_", " ")), xlabel=better)
        axis.locator_params(axis="x", nbins=3)
        axis.grid(axis="x", alpha=0.3)
    axes.flat[0].set_yticks(list(places.values()), texts, fontsize=7)
    axes.flat[0].set_ylim(ends[-1], 0)
    marks = [
        axes.flat[0].plot([], [], mark, color=colour, label=name)[0]
        for name, (colour, mark) in OUTCOMES.items()
        if name in set(checked["outcome"])
    ]
    hollow = {"color": "#767676", "mfc": "white", "label": "hollow: not after Holm's correction"}
    marks += axes.flat[0].plot([], [], "o", **hollow)
    figure.legend(handles=marks, loc="outside upper center", ncols=4, fontsize=8)
    return figure


def heat_map(tables: Mapping[str, pd.DataFrame], label: str, log_scale: bool = True) -> Figure:
    """Tables with the same rows as colours on one scale, side by side, their columns along x.

    Signed values have a map of two colours with white at 0. The cells of small tables have their
    values written in.
    """
    rows, widest = (max(table.shape[i] for table in tables.values()) for i in (0, 1))
    labels = 0.3 + 0.07 * max(len(str(name)) for t in tables.values() for name in t.index)
    wide = max(3.0 if len(tables) < 4 else 1.2, 0.42 * widest)
    columns = max(1, min(len(tables), int((WIDTH - 1.0 - labels) / wide)))
    lines = -(-len(tables) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(min(WIDTH, wide * columns + labels + 1.0), (0.27 * rows + 1.0) * lines + 0.3),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[len(tables) :]:
        axis.set_axis_off()
    values = np.concatenate([table.to_numpy(float).ravel() for table in tables.values()])
    low, high = np.nanmin(values), np.nanmax(values)
    signed = low < 0 < high
    colours = "PuOr_r" if signed else "viridis"
    if signed:
        norm = matplotlib.colors.CenteredNorm(0, max(-low, high))
    else:
        scale = matplotlib.colors.LogNorm if log_scale else matplotlib.colors.Normalize
        norm = scale(low, high)
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=False):
        image = axis.imshow(table.to_numpy(float), aspect="auto", cmap=colours, norm=norm)
        if not log_scale and widest <= 8 and len(tables) < 4:
            _write_values(axis, table.to_numpy(float), image)
        axis.set_yticks(range(len(table)), table.index)
        texts = [str(name) for name in table.columns]
        turn = 90 if sum(map(len, texts)) > 5 * len(texts) else 0  # else they would touch
        axis.set_xticks(range(len(texts)), texts, fontsize=8, rotation=turn)
        axis.set_xlabel(table.columns.name)
        axis.set_title(title)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def _write_values(axis, values: np.ndarray, image) -> None:
    """Each value in its cell, black or white, whichever is read better there."""
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
        style = {"ha": "center", "va": "center", "fontsize": 8}
        axis.text(column, row, f"{value:.2f}", color="white" if dark else "black", **style)


def trade_offs(
    rows: pd.DataFrame,
    costs: Mapping[str, str],
    measures: Mapping[str, str],
    control: str = "random",
    levels: Mapping[str, float] | None = None,
    wide: Collection[str] = (),
) -> Figure:
    """What candidates reach against what they cost: a panel for each measure and cost.

    `rows` has a column `candidate` and one for each cost and measure (their labels are the values).
    Points are means over the rows of a candidate, bars reach from the least to the largest; rows of
    candidates that begin with `control` are small crosses of their own. A candidate "family: name"
    has the mark of its family and the colour of its name. `levels` draws a line, such as the
    teacher's, in the panels of a measure. `wide` costs have a logarithmic axis, with 0 at its end.
    """
    figure, axes = plt.subplots(
        len(measures),
        len(costs),
        figsize=(min(WIDTH, 3.7 * len(costs)), 2.5 * len(measures) + 0.8),
        squeeze=False,
        sharey="row",
        sharex="col",
        layout="constrained",
    )
    families = {name.partition(": ")[0] for name in rows["candidate"] if ": " in name}
    marks = dict(zip(sorted(families - {control}), "D^sv", strict=False))
    wanted = [name.rpartition(": ")[2] for name in dict.fromkeys(rows["candidate"])]
    unique = list(dict.fromkeys(wanted))
    shades = dict(zip(unique, looks(len(unique)), strict=True))
    for line, (measure, label) in zip(axes, measures.items(), strict=True):
        for axis, cost in zip(line, costs, strict=True):
            crosses = itertools.cycle("x+")
            for candidate, group in rows.groupby("candidate", sort=False):
                x, y = group[cost], group[measure]
                family, _, name = candidate.rpartition(": ")
                if candidate.startswith(control):
                    axis.plot(x, y, next(crosses), color="#767676", ms=6, label=candidate)
                    continue
                axis.errorbar(
                    [x.mean()],
                    [y.mean()],
                    [[y.mean() - y.min()], [y.max() - y.mean()]],
                    fmt=marks.get(family) or (shades[name][2] if not families else "o"),
                    color=shades[name][0],
                    label=candidate,
                )
            if levels and measure in levels:
                axis.axhline(levels[measure], color=COLOURS[5], lw=0.8, ls=":", label="teacher")
            axis.grid(alpha=0.3)
        line[0].set_ylabel(label)
    for axis, (cost, label) in zip(axes[-1], costs.items(), strict=True):
        axis.set_xlabel(label)
        if cost in wide:
            axis.set_xscale("symlog", linthresh=10)
            axis.set_xlim(left=-1)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named, loc="outside lower center", ncols=4, fontsize=8)
    return figure
