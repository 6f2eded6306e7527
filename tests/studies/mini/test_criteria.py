"""The criteria that the mini teacher is measured by: what is met, and that a study goes on."""

import pandas as pd
import pytest

from studies.common import ledger, runner
from studies.mini import criteria, report, stages

TINY = dict(
    seeds=(0, 1), horizons=(2, 4), batch_size=2, images=8, test_images=8, drawn=2,
    sampling_steps=1, count=2, levels=1,
)  # fmt: skip


@pytest.mark.long
def test_the_study_measures_every_part_and_plan_and_is_not_repeated(tmp_path, monkeypatch):
    context = runner.Context(tmp_path / "results", tmp_path, settings=TINY)
    stages.STAGES["criteria"].run(context)
    values = ledger.read("mini_criteria", tmp_path / "results")
    assert {s["layer 0"] for s in values["bypassed"]["importance"].values()} == {1.0}
    assert set(values["bypassed"]["lost"]) == {"mid-block", "stage 3"}
    rows = pd.DataFrame(values["recovered"])
    assert len(rows) == 2 * 3 * 2 and set(rows["plan"]) == set(criteria.ORDER)
    assert rows.groupby("plan")["parameters"].nunique().eq(1).all()
    # The longer horizon is the same student, trained on.
    log = pd.read_csv(tmp_path / "criteria" / "kdc-0" / "run" / "log.csv")
    assert log["step"].max() == 4
    for name in ("sensitivity", "distill", "bound"):
        monkeypatch.setattr(criteria, name, None)
    stages.STAGES["criteria"].run(context)
    assert ledger.read("mini_criteria", tmp_path / "results") == values
    assert len(report.criteria_table(values)) == 4
    report.importance_figure(values)
    report.plans_figure(values)


def stored(lost=0.05, low=0.01, share=1e-6, plans=(0.9, 0.8, 0.7), teacher=0.95):
    shares = {
        str(s): {"layer 0": 1.0, "mid-block": share * s, "stage 3": 2 * share} for s in (1, 2, 3)
    }
    return {
        "bypassed": {
            "importance": shares,
            "lost": dict.fromkeys(criteria.INNER, {"mean": lost, "low": low, "high": 0.09}),
            "teacher": teacher,
        },
        "recovered": [
            {"seed": seed, "plan": plan, "steps": steps, "binding": right + 0.01 * seed}
            for seed in (0, 1, 2)
            for plan, right in zip(criteria.ORDER, plans, strict=True)
            for steps in (1, 2)
        ],
    }


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({}, ["yes", "yes", "yes", "yes"]),
        (dict(lost=0.015), ["no", "no", "yes", "yes"]),
        (dict(low=-0.01), ["no", "no", "yes", "yes"]),
        # A large share of the error counts as well, where its interval excludes 0.
        (dict(lost=0, low=-0.1, share=1e-2), ["no", "yes", "yes", "yes"]),
        (dict(plans=(0.8, 0.9, 0.7)), ["yes", "yes", "no", "yes"]),
        (dict(plans=(0.9, 0.9, 0.9)), ["yes", "yes", "no", "yes"]),
        (dict(teacher=0.81), ["yes", "yes", "yes", "no"]),
    ],
)
def test_a_criterion_is_met_by_mean_and_interval(changes, met):
    assert report.criteria_table(stored(**changes))["met"].tolist() == met
