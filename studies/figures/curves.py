"""Lines and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from studies.figures.colours import COLOURS


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


def lines(
    panels: Mapping[str, Mapping[str, tuple[Sequence, ...]]],
    xlabels: Sequence[str],
    scales: Sequence[str] | None = None,
    levels: Mapping[str, tuple[str, float]] | None = None,
) -> Figure:
    """Panels of lines side by side: {title: {label: (x, y)}}, an x label for each panel.

    A line may be (x, y, low, high), which draws a band from low to high.
    `scales` are "log" where both axes are logarithmic, "semilogx" where x alone is, "linear" (the
    default). `levels` {title: (label, y)} draws a dotted line across a panel.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 2.9), squeeze=False, layout="constrained"
    )
    scales = scales or ["linear"] * len(panels)
    for axis, (title, generated), xlabel, scale in zip(
        axes[0], panels.items(), xlabels, scales, strict=True
    ):
        for (label, (x, y, *band)), colour in zip(generated.items(), COLOURS * 3, strict=False):
            axis.plot(x, y, color=colour, label=label, marker="o" if len(x) < 8 else None)
            if band:
                axis.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)
        if levels and title in levels:
            label, y = levels[title]
            axis.axhline(y, ls=":", color="k", label=label)
        axis.set(title=title, xlabel=xlabel)
        if scale != "linear":
            _log_ticks(axis, [value for x, *_ in generated.values() for value in x])
        axis.set_yscale("log" if scale == "log" else "linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def _log_ticks(axis, values: Sequence[float]) -> None:
    """A logarithmic x axis: 1, 2 and 5 of each decade in plain numbers, or powers of ten.

    Powers where the decades are many or the numbers so long that they would run into each other.
    """
    axis.set_xscale("log")
    few = max(values) < min(100 * min(values), 1e4)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    if few:
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))


def doses(rows: pd.DataFrame, scores: Sequence[str], columns: int = 4) -> Figure:
    """Dose-response curves: a panel for each value of `fault`, in it a line for each score.

    `rows` has the columns `fault`, `dose` and the scores, all on one scale; several rows of a dose
    become their mean with their range. Doses are drawn at equal distances.
    """
    faults = list(dict.fromkeys(rows["fault"]))
    lines_ = -(-len(faults) // columns)
    figure, axes = plt.subplots(
        lines_,
        min(columns, len(faults)),
        figsize=(2.9 * min(columns, len(faults)), 2.4 * lines_ + 0.6),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[len(faults) :]:
        axis.set_axis_off()
    for axis, fault in zip(axes.flat, faults, strict=False):
        groups = rows[rows["fault"] == fault].groupby("dose")
        for index, score in enumerate(scores):
            colour = COLOURS[index % len(COLOURS)]
            mean = groups[score].mean()
            places = np.arange(len(mean))
            axis.plot(places, mean, color=colour, label=score, marker="o", ms=3)
            axis.fill_between(
                places, groups[score].min(), groups[score].max(), color=colour, alpha=0.2, lw=0
            )
        axis.set_xticks(places, [f"{dose:g}" for dose in mean.index], fontsize=8)
        axis.set_title(fault, fontsize=10)
        axis.set_xlabel("dose", fontsize=8)
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(scores), fontsize=8)
    return figure
