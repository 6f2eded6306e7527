"""What appendix A1 shows of the pilots: which layout makes the inner blocks work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from studies.figures import dots

INNER = ("mid-block", "stage 3")  # the parts that idled


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


def _shares(row: Mapping[str, Any]) -> pd.DataFrame:
    """Columns error, low and high by part, over the error of the outermost layer."""
    table = pd.DataFrame(row["importance"]).T
    return table / table.loc["layer 0", "error"]
