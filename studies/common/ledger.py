"""Results that the book states: JSON files with their provenance, written and read in one place."""

from __future__ import annotations

import functools
import hashlib
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

# The results that depend on the weights of an embedded model, and on which. Others measure time,
# memory or behaviour, which weights do not change.
MODELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("authors", "authors_ratio", "distillation", "found_plans", "importance", "recovery"),
        ("teacher",),
    ),
    **dict.fromkeys(
        [
            f"forgetting_{stage}"
            for stage in (
                "buffers", "classes", "domains", "photos", "plain", "ratios", "species", "teachers"
            )
        ],
        ("teacher",),
    ),
    "evaluation_few_steps": ("teacher", "student", "clip", "classifier"),
    "evaluation_steps": ("teacher", "student"),
    "evaluation_table": ("teacher", "student"),
    "metrics_trial": ("teacher", "clip", "classifier"),
    "mini_criteria": ("teacher", "scene-judge"),
    "mini_fd": ("teacher", "clip"),
    "mini_grades": ("teacher", "student", "clip", "classifier"),
    "scene_grades": ("teacher", "student", "clip", "scene-judge"),
    "scene_judge": ("scene-judge",),
}  # fmt: skip
# Of results that were stored before they said which models they measured.
FIRST_ROUND = {
    "teacher": "8725b8b9f445",
    "student": "defb6b74a7db",
    "clip": "16832152b139",
    "classifier": "dc167a5c8785",
    "scene-judge": "a6dbbf6b2b4b",
}


@functools.cache
def model_in_use(name: str) -> str:
    """The fingerprint of an embedded model's weights."""
    from kdc.pipelines import ASSETS

    files = sorted((ASSETS / f"mini-{name}").rglob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def other_models(name: str, folder: str | Path | None = None) -> list[str]:
    """The embedded models that a stored result was measured on and that are shipped no more."""
    known = _stored(name, folder)["provenance"].get("models", FIRST_ROUND)
    return [model for model in MODELS.get(name, ()) if known.get(model) != model_in_use(model)]


def provenance_of(name: str, folder: str | Path | None = None) -> dict:
    """What a stored result says of how it was made, with "commit" and "made" where known."""
    return dict(_stored(name, folder)["provenance"])


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
    if measured := MODELS.get(name):
        settings["models"] = {model: model_in_use(model) for model in measured}
    return write_json(path, {"values": values, "provenance": provenance(**settings)})


def read(name: str, folder: str | Path | None = None) -> dict:
    """The `values` of a stored result, as `write` took them.

    In a notebook it shows a warning where they were measured on a model that has been trained anew
    since. Raises `FileNotFoundError` that names the known results.
    """
    if gone := other_models(name, folder):
        _warn(name, gone)
    return _stored(name, folder)["values"]


def _stored(name: str, folder: str | Path | None) -> dict:
    path = Path(folder or RESULTS) / f"{name}.json"
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"no folder {path.parent}: stored results belong to a checkout of the project, and the "
            "installed package does not hold them"
        )
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
        raise FileNotFoundError(f"no result {name!r} in {path.parent}; there are: {known}")
    return json.loads(path.read_text())


def _warn(name: str, gone: list[str]) -> None:
    """Show once in a notebook that a result is of models which are shipped no more."""
    from IPython import get_ipython
    from IPython.display import HTML, display

    if get_ipython() is None or name in _warned:
        return
    _warned.add(name)
    models = " and ".join(f"mini {model}" for model in gone)
    display(
        HTML(
            '<div class="admonition warning"><p class="admonition-title">Measured on an earlier'
            f" model</p><p>The stored numbers of <code>{name}.json</code> belong to a {models} that"
            " has been trained anew since, and have not been measured again.</p></div>"
        )
    )


_warned: set[str] = set()
