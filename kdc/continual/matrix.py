"""What a sequence of tasks did to a score: the matrix R[t, k], and its measures in one number.

R[t, k] is the score of task k after learning task t, both counted from 0. Of some scores lower is
better (Fréchet distance, KID, LPIPS), of others higher (accuracy, CLIP score). Measures named after
a loss (forgetting) are positive where things got worse, measures named after a gain
(transfer, retention) are positive where they got better, whatever the direction; plasticity and
the average stay in the score's own sense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True, eq=False)
class ScoreMatrix:
    """R (T, K) of one metric, K >= T; NaN where nothing was measured.

    `start` (K,) are the scores before the first task and `reference` (T + 1,) the scores of what
    the model knew beyond the tasks, before the first and after every task; both may be absent.
    `names` are those of the tasks, in order. Raises `ValueError` for shapes that do not fit and an
    unknown direction. The arrays are read-only float64 copies.
    """

    values: np.ndarray
    higher_is_better: bool
    metric: str = "score"
    names: Sequence[str] = ()
    start: np.ndarray | None = None
    reference: np.ndarray | None = None

    def __post_init__(self):
        if not isinstance(self.higher_is_better, bool):
            raise ValueError(f"higher_is_better must be True or False: {self.higher_is_better!r}")
        values = _frozen(self.values)
        if values.ndim != 2 or not 1 <= values.shape[0] <= values.shape[1]:
            raise ValueError(
                f"the matrix must be (T, K) with 1 <= T <= K, not {values.shape}: a row for every "
                "learnt task, a column for every task"
            )
        rows, columns = values.shape
        names = tuple(self.names) or tuple(f"task {k}" for k in range(columns))
        if len(names) != columns:
            raise ValueError(f"{len(names)} names for {columns} tasks")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "names", names)
        for name, length in (("start", columns), ("reference", rows + 1)):
            given = getattr(self, name)
            if given is not None:
                given = _frozen(given)
                if given.shape != (length,):
                    raise ValueError(f"{name} must have {length} scores, not shape {given.shape}")
                object.__setattr__(self, name, given)

    def __eq__(self, other) -> bool:
        if not isinstance(other, ScoreMatrix):
            return NotImplemented
        plain = ("higher_is_better", "metric", "names")
        if any(getattr(self, name) != getattr(other, name) for name in plain):
            return False
        return all(
            (a is None) == (b is None) and (a is None or np.array_equal(a, b, equal_nan=True))
            for a, b in ((getattr(self, n), getattr(other, n)) for n in _ARRAYS)
        )

    @property
    def sign(self) -> float:
        """+1 where higher is better, -1 where lower is: makes every difference a gain."""
        return 1.0 if self.higher_is_better else -1.0

    @property
    def average_final(self) -> float:
        """Mean over the learnt tasks of R[T-1, k], in the score's own sense."""
        return _mean(self.values[-1, : len(self.values)])

    @property
    def plasticity(self) -> float:
        """Mean of R[k, k]: how well a task is known just after it was learnt."""
        return _mean(self.values.diagonal())

    def forgotten(self) -> np.ndarray:
        """How much worse task k is at the end than just after it was learnt, (T - 1,).

        R[T-1, k] - R[k, k] where lower is better, its negative where higher is.
        """
        earlier = self.values.diagonal()[:-1]
        return -self.sign * (self.values[-1, : len(earlier)] - earlier)

    @property
    def forgetting(self) -> float:
        """Mean of `forgotten` over all learnt tasks but the last; negative: they got better."""
        return _mean(self.forgotten())

    @property
    def backward_transfer(self) -> float:
        """What later tasks gave the earlier (Lopez-Paz & Ranzato 1706.08840): -`forgetting`."""
        return -self.forgetting

    @property
    def forward_transfer(self) -> float:
        """What earlier tasks gave a task before it was learnt, against `start`.

        Mean over k >= 1 of R[k-1, k] - start[k], signed so that a gain is positive (1706.08840);
        NaN without `start`.
        """
        if self.start is None:
            return float("nan")
        before = self.values[:-1].diagonal(1)[: len(self.values) - 1]
        return _mean(self.sign * (before - self.start[1 : len(before) + 1]))

    @property
    def retention(self) -> float:
        """Change of the reference score over all tasks, negative where knowledge was lost.

        NaN without `reference`.
        """
        if self.reference is None:
            return float("nan")
        return float(self.sign * (self.reference[-1] - self.reference[0]))

    def measures(self) -> pd.Series:
        """All measures by name."""
        names = (
            "average_final",
            "plasticity",
            "forgetting",
            "backward_transfer",
            "forward_transfer",
            "retention",
        )
        return pd.Series({name: getattr(self, name) for name in names}, name=self.metric)

    def to_frame(self) -> pd.DataFrame:
        """The matrix with names: a row after every learnt task, a column for every task."""
        after = [f"after {name}" for name in self.names[: len(self.values)]]
        return pd.DataFrame(self.values, index=after, columns=list(self.names))

    def to_dict(self) -> dict:
        """Plain values for a ledger; None where nothing was measured. See `from_dict`."""
        arrays = {n: _plain(getattr(self, n)) for n in _ARRAYS}
        plain = {
            "higher_is_better": self.higher_is_better,
            "metric": self.metric,
            "names": list(self.names),
        }
        return arrays | plain

    @classmethod
    def from_dict(cls, values: dict) -> ScoreMatrix:
        """The inverse of `to_dict`."""
        arrays = {n: None if values[n] is None else np.array(values[n], float) for n in _ARRAYS}
        return cls(**(values | arrays))


_ARRAYS = ("values", "start", "reference")


def _frozen(values) -> np.ndarray:
    array = np.array(values, dtype=np.float64)
    array.flags.writeable = False
    return array


def _mean(values: np.ndarray) -> float:
    """NaN for nothing and for anything that was not measured, without a warning."""
    return float(values.mean()) if len(values) else float("nan")


def _plain(array: np.ndarray | None) -> list | None:
    if array is None:
        return None
    return np.where(np.isnan(array), None, array.astype(object)).tolist()
