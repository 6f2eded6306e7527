"""Lines and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from studies.figures.colours import WIDTH, looks


def curves(
    logs: Mapping[str, pd.DataFrame | Sequence[pd.DataFrame]],
    terms: Sequence[str],
    smooth: int = 1,
    log_scale: bool = True,
) -> Figure:
    """One panel a term, one line a run; several logs of a run become a mean with its range."""
    figure, axes = _panels(len(terms), 2.4)
    for axis, term in zip(axes, terms, strict=True):
        for (name, runs), (colour, style, *_) in zip(logs.items(), looks(len(logs)), strict=True):
            runs = [runs] if isinstance(runs, pd.DataFrame) else runs
            lines = [r.set_index("step")[term] for r in runs if term in r]
            if not lines:
                continue
            table = pd.concat(lines, axis=1).rolling(smooth, min_periods=1).mean()
            axis.plot(table.index, table.mean(axis=1), color=colour, ls=style, label=name, lw=1.5)
            if table.shape[1] > 1:
                low, high = table.min(axis=1), table.max(axis=1)
                axis.fill_between(table.index, low, high, color=colour, alpha=0.2, lw=0)
        axis.set(title=term, xlabel="step")
        if log_scale and axis.lines:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    if len(logs) > 1:
        handles, labels = max(
            (a.get_legend_handles_labels() for a in axes), key=lambda x: len(x[0])
        )
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(3, len(logs)), fontsize=8
        )
    return figure


def _panels(count: int, height: float, columns: int = 2, **shared):
    """A figure of so many panels, at most `columns` side by side, and its axes in order."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(min(WIDTH, 3.7 * columns), height * rows + 0.3),
        squeeze=False,
        layout="constrained",
        **shared,
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def bars(
    values: Mapping[str, Mapping[str, float]],
    ylabel: str,
    log_scale: bool = False,
    errors: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Groups of bars: {group: {bar: value}}, the bars of one name in one colour."""
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    wide = min(WIDTH, max(4.5, 0.45 * len(names) * len(values) + 2))
    figure, axis = plt.subplots(figsize=(wide, 3), layout="constrained")
    width = 0.8 / len(names)
    for index, (name, look) in enumerate(zip(names, looks(len(names)), strict=True)):
        heights = [group.get(name, np.nan) for group in values.values()]
        error = [errors[g].get(name, 0) for g in values] if errors else None
        places = np.arange(len(values)) + (index - (len(names) - 1) / 2) * width
        style = {"color": look[0], "hatch": look[3], "edgecolor": "white", "ecolor": "black"}
        axis.bar(places, heights, width * 0.92, label=name, yerr=error, **style)
    longest = max(map(len, values))
    turned = 45 if longest * len(values) > 12 * wide else 0  # else they would touch
    places = {"rotation": turned, "ha": "right" if turned else "center"}
    axis.set_xticks(range(len(values)), list(values), **places)
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
    `scales` are "log" where both axes are logarithmic, "semilogx" or "semilogy" where one is,
    "linear" (the default). `levels` {title: (label, y)} draws a dotted line across a panel.
    """
    figure, axes = _panels(len(panels), 2.7)
    scales = scales or ["linear"] * len(panels)
    for axis, (title, generated), xlabel, scale in zip(
        axes, panels.items(), xlabels, scales, strict=True
    ):
        for (label, (x, y, *band)), (colour, style, mark, _) in zip(
            generated.items(), looks(len(generated)), strict=True
        ):
            mark = mark if len(x) < 12 else None
            axis.plot(x, y, color=colour, ls=style, label=label, marker=mark, ms=4)
            if band:
                axis.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)
        if levels and title in levels:
            label, y = levels[title]
            axis.axhline(y, ls=":", color="k", label=label)
        axis.set(title=title, xlabel=xlabel)
        if scale in ("log", "semilogx"):
            _log_ticks(axis, [value for x, *_ in generated.values() for value in x])
        axis.set_yscale("log" if scale in ("log", "semilogy") else "linear")
        axis.grid(alpha=0.3)
        if any(generated):
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


def doses(rows: pd.DataFrame, scores: Sequence[str], columns: int = 3) -> Figure:
    """Dose-response curves: a panel for each value of `fault`, in it a line for each score.

    `rows` has the columns `fault`, `dose` and the scores, all on one scale; several rows of a dose
    become their mean with their range. Doses are drawn at equal distances.
    """
    faults = list(dict.fromkeys(rows["fault"]))
    figure, axes = _panels(len(faults), 2.1, columns, sharey=True)
    for axis, fault in zip(axes, faults, strict=True):
        groups = rows[rows["fault"] == fault].groupby("dose")
        for score, (colour, style, mark, _) in zip(scores, looks(len(scores)), strict=True):
            mean = groups[score].mean()
            places = np.arange(len(mean))
            axis.plot(places, mean, color=colour, ls=style, label=score, marker=mark, ms=3.5)
            axis.fill_between(
                places, groups[score].min(), groups[score].max(), color=colour, alpha=0.2, lw=0
            )
        axis.set_xticks(places, [f"{dose:g}" for dose in mean.index], fontsize=8)
        axis.set(title=fault, xlabel="dose")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(scores), fontsize=8)
    return figure
