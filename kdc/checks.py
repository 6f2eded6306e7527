"""Arguments looked at before any work: whole numbers, numbers and texts. Imports nothing heavy."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

MOST_SEEDS = 2**32  # tasks take 1,000 times a seed, draws 100,003 times that: 63 bits hold it


def whole_number(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int: `TypeError` for what is no whole number, `ValueError` out of bounds."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if number < low:
        raise ValueError(f"{name} must be at least {low}, not {number}")
    if high is not None and number > high:
        raise ValueError(f"{name} must be at most {high}, not {number}")
    return number


def finite_number(name: str, value: Any) -> float:
    """`value`: `TypeError` for what is no number, `ValueError` for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return value


def as_texts(name: str, values: str | Iterable[str]) -> list[str]:
    """A list of texts; a text by itself is one of them, and not its letters.

    Raises `TypeError` naming the first that is no text.
    """
    texts = [values] if isinstance(values, str) else list(values)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be texts, but number {place} is {text!r}")
    return texts


def as_seeds(name: str, values: int | Iterable[int]) -> list[int]:
    """A list of different seeds; a number by itself is one of them.

    Raises `TypeError` for what are no whole numbers, a text for instance, and `ValueError` for no
    seed, for negative and for equal ones, which would hide the spread.
    """
    if isinstance(values, str):
        raise TypeError(f"{name} must be whole numbers, not {values!r}")
    given = list(values) if isinstance(values, Iterable) else [values]
    seeds = [whole_number(name, seed, 0, MOST_SEEDS) for seed in given]
    if not seeds:
        raise ValueError(f"{name}: give at least one")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{name} must differ, not {seeds}: equal ones hide the spread")
    return seeds
