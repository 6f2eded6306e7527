"""Claims, written down before they are measured, and what the rows of a study say of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from kdc.evaluation.statistics import holm
from studies.common.protocol import compare_rows

NUMBERS = ("mean", "low", "high", "p")
COMPARED = ("claim", "candidate", "baseline", "measure", "expected")
COLUMNS = (*COMPARED, *NUMBERS, "seeds", "found", "outcome")
EXPECTED = ("better", "worse", "not worse", "open")


@dataclass(frozen=True)
class Claim:
    """That `candidate`, against `baseline`, comes out as `expected` in `measure`.

    "not worse" is refuted by "worse" alone; "open" says that no difference is to be seen, and is
    refuted by "better" and by "worse". That no difference was seen does not show that there is
    none, so these two stay open where nothing was. Raises `ValueError` for another expectation.
    """

    text: str
    candidate: str
    baseline: str
    measure: str
    expected: str = "better"

    def __post_init__(self):
        if self.expected not in EXPECTED:
            raise ValueError(f"expected {self.expected!r}; it can be {', '.join(EXPECTED)}")

    def outcome(self, verdict: str) -> str:
        """What a verdict of `compare_rows` means for it: "holds", "refuted" or "open"."""
        if verdict == "open":
            return "open"
        if verdict == self.expected or (self.expected, verdict) == ("not worse", "better"):
            return "holds"
        return "refuted"


def check(rows: pd.DataFrame, claims: Iterable[Claim]) -> pd.DataFrame:
    """A row for each claim: the difference candidate - baseline over seeds, verdict and outcome.

    Claims about measures or candidates that are not in `rows` are left out. Differences are those
    of `compare_rows`. "adjusted" are their p-values by Holm's correction for all these claims; the
    outcome is that of each claim by itself.
    """
    table, known = [], set(rows["candidate"])
    for claim in claims:
        if claim.measure not in rows or not {claim.candidate, claim.baseline} <= known:
            continue
        found = compare_rows(rows, claim.candidate, claim.baseline, [claim.measure])
        found = found.loc[claim.measure]
        table.append(
            {
                "claim": claim.text,
                "candidate": claim.candidate,
                "baseline": claim.baseline,
                "measure": claim.measure,
                "expected": claim.expected,
                **{name: float(found[name]) for name in NUMBERS},
                "seeds": found["n"],
                "found": found["verdict"],
                "outcome": claim.outcome(found["verdict"]),
            }
        )
    return one_family([pd.DataFrame(table, columns=COLUMNS)])


def one_family(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Tables of `check` as one, with "adjusted" for all claims of all of them."""
    table = pd.concat(tables, ignore_index=True)
    return table.assign(adjusted=holm(list(table["p"])))


def survivors(table: pd.DataFrame, alpha: float = 0.05) -> str:
    """How many differences of a family are significant, each by itself and among all of them."""
    alone, among = ((table[name] < alpha).sum() for name in ("p", "adjusted"))
    return (
        f"significant (p < {alpha:g}): {alone} of {table['p'].notna().sum()} differences by"
        f" themselves, {among} among all of them (Holm's correction)"
    )
