"""The stage of appendix A2's study."""

from __future__ import annotations

from pathlib import Path

from studies.common import ledger
from studies.common.runner import Context, Stage
from studies.metrics.study import bias, hold

COUNTS = (32, 64, 128, 256, 512, 1024, 2048)


def _trial(context: Context) -> list[Path]:
    settings = {"count": 192, "seeds": (0, 1, 2)} | dict(context.settings)
    gaussians = bias(COUNTS)
    rows = hold(**settings, folder=context.folder)
    values = {"rows": rows.to_dict("records"), "gaussians": gaussians.to_dict("records")}
    return [ledger.write("metrics_trial", values, context.results, **settings)]


STAGES = {
    "trial": Stage(
        _trial,
        "images spoilt in known ways, and which score notices",
        ("metrics_trial.json",),
    ),
}
