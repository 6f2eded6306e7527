"""Claims, written down before they are measured, and what the rows of a study say of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from studies.common.protocol import compare_rows

COLUMNS = ("claim", "compared", "in", "expected", "difference", "seeds", "found", "outcome")
EXPECTED = ("better", "worse", "not worse", "open")


@dataclass(frozen=True)
class Claim:
    """That `candidate`, against `baseline`, comes out as `expected` in `measure`.

    "not worse" is refuted by "worse" alone; "open" says that no difference is to be seen, and is
    refuted by "better" and by "worse". That no difference was seen does not show that there is
    none: what those two claim is then "not refuted". Raises `ValueError` for another expectation.
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
        """What a verdict of `compare_rows` means for it: holds, FAILS, not refuted or open."""
        if verdict == "open":
            return "not refuted" if self.expected in ("not worse", "open") else "open"
        if verdict == self.expected or (self.expected, verdict) == ("not worse", "better"):
            return "holds"
        return "FAILS"


def laid_out(table: pd.DataFrame) -> pd.DataFrame:
    """What `check` gives for the eye: equal claims said once, without what the rest implies.

    The outcome stands first, because a narrow page cuts off what stands last.
    """
    rows = table.set_index(["claim", "compared", "in"])
    return rows[["outcome", "difference", "expected"]]


def check(rows: pd.DataFrame, claims: Iterable[Claim]) -> pd.DataFrame:
    """A row for each claim: the difference candidate - baseline over seeds, verdict and outcome.

    Claims about measures or candidates that are not in `rows` are left out. Differences are those
    of `compare_rows`. There are as many chances to be wrong as there are rows: of twenty true
    claims of "open" one is expected to fail.
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
                "compared": f"{claim.candidate} - {claim.baseline}",
                "in": claim.measure,
                "expected": claim.expected,
                "difference": f"{found['mean']:+.3g} [{found['low']:+.3g}, {found['high']:+.3g}]",
                "seeds": found["n"],
                "found": found["verdict"],
                "outcome": claim.outcome(found["verdict"]),
            }
        )
    return pd.DataFrame(table, columns=COLUMNS)
