"""What appendix A2 shows of the trial of the metrics."""

from __future__ import annotations

import pandas as pd

from studies.common.protocol import higher_is_better
from studies.metrics.study import NOTICED, SCORES


def verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    """For each fault and score: how much worse it got at the largest dose, in units of its spread.

    The spread is the deviation over seeds of the unspoilt images' score, at least a thousandth of
    the scores' range. `noticed` is a fall of more than three of them, `expected` what was written
    down, `ok` whether they agree.
    """
    found = []
    for fault, group in rows.groupby("fault", sort=False):
        clean = group[group["dose"] == group["dose"].min()]
        worst = group[group["dose"] == group["dose"].max()]
        for score in SCORES:
            change = worst[score].mean() - clean[score].mean()
            worse = -change if higher_is_better(score) else change
            spread = clean[score].std(ddof=1) if len(clean) > 1 else 0.0
            spread = max(spread, 1e-3 * (rows[score].max() - rows[score].min()), 1e-9)
            noticed, expected = worse / spread > 3, score in NOTICED[fault]
            found.append(
                {"fault": fault, "score": score, "change": change, "spreads": worse / spread}
                | {"noticed": noticed, "expected": expected, "ok": noticed == expected}
            )
    return pd.DataFrame(found)


def scaled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with every score turned so that higher is better and scaled to its range, 0 to 1."""
    out = rows.copy()
    for score in SCORES:
        values = rows[score] if higher_is_better(score) else -rows[score]
        out[score] = (values - values.min()) / max(values.max() - values.min(), 1e-12)
    return out
