"""What a budget means: the values behind the parameters that a notebook's reader left open."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace


def settle(budget: str, table: Mapping[str, Mapping], **given) -> SimpleNamespace:
    """The row of `table` for `budget`, with every value of `given` that is not None put over it.

    Raises `ValueError` for an unknown budget or a name that the row does not have, and for a step,
    batch or seed count that could not be run.
    """
    if budget not in table:
        raise ValueError(f"unknown budget {budget!r}; the budgets are {', '.join(table)}")
    row = dict(table[budget])
    if unknown := set(given) - set(row):
        raise ValueError(f"budget {budget!r} says nothing about {', '.join(sorted(unknown))}")
    row |= {name: value for name, value in given.items() if value is not None}
    for name in {"steps", "batch_size"} & set(row):
        if type(row[name]) is not int or row[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {row[name]!r}")
    seeds = row.get("seeds", [0])
    if not isinstance(seeds, list | tuple) or not seeds or any(type(s) is not int for s in seeds):
        raise ValueError(
            f"seeds must be a list of whole numbers, not {seeds!r}; papermill takes one as "
            "-y 'seeds: [0, 1, 2]'"
        )
    return SimpleNamespace(**row)
