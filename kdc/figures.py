"""Arrays in, matplotlib figures out. Imports no other module of the library."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

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


def lines(
    panels: Mapping[str, Mapping[str, tuple[Sequence, Sequence]]],
    xlabels: Sequence[str],
    scales: Sequence[str] | None = None,
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Panels of lines side by side: {title: {label: (x, y)}}, an x label for each panel.

    `scales` are "log" where both axes are logarithmic, "semilogx" where x alone is, "linear" (the
    default). `levels` draws a dotted line across the panel of that title.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 2.9), squeeze=False, layout="constrained"
    )
    scales = scales or ["linear"] * len(panels)
    for axis, (title, drawn), xlabel, scale in zip(
        axes[0], panels.items(), xlabels, scales, strict=True
    ):
        for (label, (x, y)), colour in zip(drawn.items(), COLOURS * 3, strict=False):
            axis.plot(x, y, color=colour, label=label, marker="o" if len(x) < 8 else None)
        if levels and title in levels:
            axis.axhline(levels[title], ls=":", color="k", label="the closed form")
        axis.set(title=title, xlabel=xlabel)
        axis.set_xscale("linear" if scale == "linear" else "log")
        axis.set_yscale("log" if scale == "log" else "linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def heat_map(tables: Mapping[str, pd.DataFrame], label: str, log_scale: bool = True) -> Figure:
    """Tables with the same rows as colours on one scale, side by side, their columns along x."""
    rows, widest = (max(table.shape[i] for table in tables.values()) for i in (0, 1))
    figure, axes = plt.subplots(
        1,
        len(tables),
        figsize=(max(3.0, 0.42 * widest) * len(tables) + 2.3, 0.27 * rows + 1.3),
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
        axis.set_xticks(range(table.shape[1]), table.columns, fontsize=8)
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
