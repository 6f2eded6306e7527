"""The stage of appendix A2's study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studies.common import ledger
from studies.metrics.study import bias, hold


def run(
    results: str | Path | None = None,
    folder: str | Path = "outputs/trial",
    count: int = 192,
    seeds: Sequence[int] = (0, 1, 2),
) -> Path:
    """Hold the whole trial and write `metrics_trial.json`; see `hold`."""
    gaussians = bias((32, 64, 128, 256, 512, 1024, 2048))
    rows = hold(count=count, seeds=seeds, folder=folder)
    values = {"rows": rows.to_dict("records"), "gaussians": gaussians.to_dict("records")}
    return ledger.write("metrics_trial", values, results, count=count, seeds=seeds)
