"""Results that the book states: JSON files with their provenance, written and read in one place."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from kdc.io import write_json

RESULTS = Path(__file__).resolve().parents[2] / "results"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "torchmetrics", "lpips")


def provenance(**settings) -> dict:
    """What a number depends on: versions, device, commit, time (UTC), and the given settings.

    Raises `ValueError` for a setting that has the name of one of the others.
    """
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    own = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": device,
        "threads": torch.get_num_threads(),
    }
    if both := sorted(own.keys() & settings.keys()):
        raise ValueError(f"the provenance has a {', '.join(both)} of its own: name it otherwise")
    return own | settings


def this_run(started: float, **settings) -> pd.DataFrame:
    """The provenance of a notebook's run as a table; `started` is `time.perf_counter()` then."""
    values = provenance(**settings, wall_seconds=round(time.perf_counter() - started, 1))
    values |= values.pop("packages")  # a row each: a table cuts long values off
    return pd.Series(values, name="this run").map(str).to_frame()


def _commit() -> str | None:
    """The commit of the code, marked when the tree has uncommitted changes.

    None outside git, and where this code lies in a repository that is not its own.
    """
    if _git("rev-parse", "--show-toplevel") != str(RESULTS.parent.resolve()):
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=12")


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *command], cwd=RESULTS.parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def write(name: str, values: dict, folder: str | Path | None = None, **settings) -> Path:
    """Write `values` with their provenance to `<folder>/<name>.json` (default: `results/`).

    The file is written beside and renamed, so that a reader never sees half of it.
    """
    path = Path(folder or RESULTS) / f"{name}.json"
    return write_json(path, {"values": values, "provenance": provenance(**settings)})


def read(name: str, folder: str | Path | None = None) -> dict:
    """The `values` of a stored result. Raises `FileNotFoundError` that names the known results."""
    path = Path(folder or RESULTS) / f"{name}.json"
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"no folder {path.parent}: stored results belong to a checkout of the project, and the "
            "installed package does not hold them"
        )
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
        raise FileNotFoundError(f"no result {name!r} in {path.parent}; there are: {known}")
    return json.loads(path.read_text())["values"]
