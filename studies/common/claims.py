"""Claims, written down before they are measured, and what the rows of a study say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from studies.common.protocol import MEASURES, compare

COLUMNS = ("claim", "compared", "in", "expected", "difference", "seeds", "found", "outcome")
EXPECTED = ("better", "worse", "not worse", "open")


@dataclass(frozen=True)
class Claim:
    """That `candidate`, against `baseline`, comes out as `expected` in `measure`.

    "not worse" is found false by "worse" alone; "open" says that there is no difference to be seen,
    and is found false by "better" and by "worse". That no difference was seen does not show that
    there is none: what those two claim is then "not refuted". Raises `ValueError` for another word.
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
        """What a verdict of `compare` means for it: holds, FAILS, not refuted or open."""
        if verdict == "open":
            return "not refuted" if self.expected in ("not worse", "open") else "open"
        if verdict == self.expected or (self.expected, verdict) == ("not worse", "better"):
            return "holds"
        return "FAILS"


def read_claims(table: str) -> list[Claim]:
    """A claim for each line "text | candidate | baseline | measure | expected", the last if it is not
    "better"."""
    return [Claim(*(cell.strip() for cell in x.split("|"))) for x in table.split("\n") if x]


def laid_out(table: pd.DataFrame) -> pd.DataFrame:
    """What `check` gives for the eye: equal claims said once, without what the rest implies.

    The outcome stands first, because a narrow page cuts off what stands last.
    """
    rows = table.set_index(["claim", "compared", "in"])
    return rows[["outcome", "difference", "expected"]]


def check(
    rows: pd.DataFrame, claims: Iterable[Claim], measures: Mapping[str, str] = MEASURES
) -> pd.DataFrame:
    """A row for each claim: the difference candidate - baseline over seeds, the verdict, the outcome.

    Claims about measures or candidates that are not in `rows` are left out. Differences are paired
    by seed, with Student's 95 % interval (see `compare`). There are as many
    chances to be wrong as there are rows: of twenty true claims of "open" one is expected to fail.
    """
    table, known = [], set(rows["candidate"])
    for claim in claims:
        if claim.measure not in rows or not {claim.candidate, claim.baseline} <= known:
            continue
        found = compare(rows, claim.candidate, claim.baseline, measures=measures).loc[claim.measure]
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
