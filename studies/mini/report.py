"""What appendix A1 shows of the pilots, the legs and the criteria of the mini teacher."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from kdc.evaluation.statistics import student_interval
from studies.figures import dots
from studies.mini import criteria

INNER = criteria.INNER  # the parts that idled
SETS = ("one object", "two objects", "three objects")


def pilot_table(stored: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each variant: its layout, its error on the noise, and what inner parts are worth.

    "over layer 0": the error when a part is bypassed, over that of the outermost layer.
    """
    rows = {}
    for row in stored["rows"]:
        shares = _shares(row)["error"]
        rows[row["variant"]] = {
            "channels": " ".join(map(str, row["widths"])),
            "heads": " ".join(map(str, row["heads"])),
            "noise error": f"{row['noise_error']:.3f}",
            **{f"{part}, over layer 0": f"{shares[part]:.0e}" for part in INNER},
        }
    table = pd.DataFrame(rows).T
    table.index.name = "variant"
    return table


def pilot_figure(stored: Mapping[str, Any]) -> Figure:
    """What bypassing each part costs, over what the outermost layer does, by variant."""
    shares = {row["variant"]: _shares(row) for row in stored["rows"]}
    order = next(iter(shares.values()))["error"].sort_values(ascending=False).index
    table = pd.DataFrame({name: each["error"] for name, each in shares.items()}).loc[order]
    ends = {
        name: (each["low"].loc[order], each["high"].loc[order]) for name, each in shares.items()
    }
    return dots(table, "error when bypassed, over that of layer 0", ends, log_scale=True)


def legs_table(stored: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each leg of the teacher's training, or long pilot: what it draws, and its parts."""
    rows = {}
    for row in stored["rows"]:
        shares, shown = _shares(row)["error"], row["grades"]["shown"]
        rows[row.get("variant") or f"{row['images']:,} images"] = {
            "noise error": f"{row['noise_error']:.3f}",
            **{f"{name}, bound": f"{100 * shown[name]['binding']:.0f} %" for name in SETS},
            **{f"{part}, over layer 0": f"{shares[part]:.0e}" for part in INNER},
        }
    return pd.DataFrame(rows).T


def importance_figure(stored: Mapping[str, Any]) -> Figure:
    """What bypassing each part of the teacher costs, mean and range over seeds."""
    by_seed = pd.DataFrame(stored["bypassed"]["importance"])
    by_seed = by_seed.loc[by_seed.mean(axis=1).sort_values(ascending=False).index]
    table = by_seed.mean(axis=1).to_frame("teacher")
    ends = {"teacher": (by_seed.min(axis=1), by_seed.max(axis=1))}
    return dots(table, "error when bypassed, over that of layer 0", ends, log_scale=True)


def plans_figure(stored: Mapping[str, Any]) -> Figure:
    """Binding accuracy of each plan's student after recovery, mean and range over seeds."""
    rows = pd.DataFrame(stored["recovered"])
    by_plan = rows.groupby(["steps", "plan"], sort=False)["binding"]
    mean, low, high = (getattr(by_plan, of)().unstack("steps") for of in ("mean", "min", "max"))
    names = {steps: f"after {steps:,} updates" for steps in mean}
    ends = {names[steps]: (low[steps], high[steps]) for steps in mean}
    return dots(mean.rename(columns=names), "two objects bound", ends)


def criteria_table(stored: Mapping[str, Any]) -> pd.DataFrame:
    """Each criterion, what was measured, and whether it is met."""
    found, rows = stored["bypassed"], pd.DataFrame(stored["recovered"])
    by_seed = pd.DataFrame(found["importance"])
    table = []
    for part in criteria.INNER:
        lost, shares = found["lost"][part], by_seed.loc[part]
        low, high = student_interval(shares.tolist())
        met = (lost["mean"] >= criteria.LOSS and lost["low"] > 0) or (
            shares.mean() >= criteria.SHARE and low > 0
        )
        said = (
            f"{shares.mean():.1e} [{low:.1e}, {high:.1e}] of layer 0's error, "
            f"{100 * lost['mean']:.1f} [{100 * lost['low']:.1f}, {100 * lost['high']:.1f}] points"
        )
        table.append((f"{part} earns its place", said, met))
    last = rows[rows["steps"] == rows["steps"].max()]
    wide = last.pivot(index="seed", columns="plan", values="binding")
    means = [wide[plan].mean() for plan in criteria.ORDER]
    gaps = [student_interval((wide[a] - wide[b]).tolist()) for a, b in pairwise(criteria.ORDER)] + [
        student_interval((wide[criteria.ORDER[0]] - wide[criteria.ORDER[-1]]).tolist())
    ]
    said = ", ".join(
        f"{plan} {100 * m:.1f} %" for plan, m in zip(criteria.ORDER, means, strict=True)
    )
    ordered = means == sorted(means, reverse=True) and any(low > 0 for low, _ in gaps)
    table.append(("plans order as published, one gap significant", said, ordered))
    low, high = student_interval((found["teacher"] - wide["kdc"]).tolist())
    said = (
        f"{100 * wide['kdc'].mean():.1f} % of {100 * found['teacher']:.1f} %, "
        f"{100 * low:.1f} to {100 * high:.1f} points below"
    )
    table.append(("the kdc student stays below its teacher", said, low > 0))
    frame = pd.DataFrame(table, columns=["criterion", "measured", "met"]).set_index("criterion")
    return frame.assign(met=frame["met"].map({True: "yes", False: "no"}))


def _shares(row: Mapping[str, Any]) -> pd.DataFrame:
    """Columns error, low and high by part, over the error of the outermost layer."""
    table = pd.DataFrame(row["importance"]).T
    return table / table.loc["layer 0", "error"]
