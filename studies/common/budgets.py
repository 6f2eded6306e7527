"""What a budget means: the values behind the parameters that a notebook's reader left open."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence, Set
from types import SimpleNamespace

from IPython import get_ipython

INJECTED = "# Parameters\n"  # how the cell begins that papermill puts after the notebook's own


def settle(budget: str, table: Mapping[str, Mapping], **given) -> SimpleNamespace:
    """The row of `table` for `budget`, with every value of `given` that is not None put over it.

    Raises `ValueError` for an unknown budget or a name that the row does not have, for a step,
    batch or seed count that could not be run, and for a parameter that papermill gave and the
    notebook does not have.
    """
    session = get_ipython()
    refuse_unknown(session.user_ns.get("In", []) if session else [])
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


def refuse_unknown(cells: Sequence[str]) -> None:
    """Raise `ValueError` for a name that papermill injected and the cell before it does not have.

    `cells` are the sources of the cells that ran so far. Papermill itself only warns, and the
    notebook would run with its defaults.
    """
    for own, given in zip(cells, cells[1:], strict=False):
        if not given.startswith(INJECTED):
            continue
        known = _assigned(own)
        if message := unknown_names("this notebook", _assigned(given), known):
            raise ValueError(message)


def unknown_names(notebook: str, given: Set[str], known: Set[str]) -> str:
    """What is said of given parameters that a notebook does not have; "" where it has them all."""
    if not (unknown := sorted(given - known)):
        return ""
    close = difflib.get_close_matches(unknown[0], known, n=1)
    return (
        f"{notebook} has no parameter {', '.join(unknown)}; "
        + (f"did you mean {close[0]}? " if close else "")
        + f"it has: {', '.join(sorted(known)) or 'none'}"
    )


def _assigned(source: str) -> set[str]:
    """The names that a cell assigns."""
    found = set()
    for line in ast.parse(source).body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found
