"""The study of few steps: what it writes, that it goes on, and how speed comes apart."""

import dataclasses

import pytest

from studies.common import ledger, runner
from studies.evaluation import few_steps, stages
from studies.evaluation.few_steps import Settings, factors, lost

TINY = Settings(
    seeds=(0, 1), updates=1, batch_size=2, images=8, steps=(1, 2), generated=8, goal_steps=2,
    grid=10, rounds=1,
)  # fmt: skip


@pytest.mark.long
def test_the_stage_writes_rows_and_times_and_goes_on(tmp_path):
    context = runner.Context(
        results=tmp_path / "results", folder=tmp_path / "kept", settings=dataclasses.asdict(TINY)
    )
    paths = stages.STAGES["few-steps"].run(context)
    images, captions = few_steps.shown(tmp_path / "results")
    assert len(images) == len(few_steps.DRAWN) and len(images["teacher, 50 steps"]) == len(captions)
    values = ledger.read("evaluation_few_steps", tmp_path / "results")
    rows = {(r["pipeline"], r["steps"], r["seed"]): r for r in values["rows"]}
    names = {"teacher", "shipped student", "few-step student"}
    assert {name for name, _, _ in rows} == names
    assert rows["few-step student", 2, 1]["guidance"] == 1.0
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
    assert values["times"][0]["pipeline"] == "teacher" and values["times"][0]["ratio"] == 1
    before = (tmp_path / "kept" / "few-teacher-2-0.json").stat().st_mtime_ns
    assert stages.STAGES["few-steps"].run(context) == paths
    assert (tmp_path / "kept" / "few-teacher-2-0.json").stat().st_mtime_ns == before


def test_the_factors_of_speed_multiply_to_the_whole():
    seconds = {
        ("teacher", 50): 12.0, ("teacher", 4): 1.2, (few_steps.SHIPPED, 50): 8.0,
        (few_steps.SHIPPED, 4): 0.9, ("few-step student", 4): 0.5,
    }  # fmt: skip
    times = [{"pipeline": n, "steps": s, "median": t} for (n, s), t in seconds.items()]
    found = factors(times, 4)
    assert found["together"] == pytest.approx(24)
    product = found["slimming"] * found["fewer steps"] * found["no second call"]
    assert product == pytest.approx(found["together"])
    assert found["slimming"] == pytest.approx(1.5) and found["no second call"] == pytest.approx(1.8)


def test_what_is_lost_is_paired_by_seed():
    rows = [
        {"pipeline": name, "steps": steps, "seed": seed, "accuracy": accuracy}
        for seed, (ours, theirs) in enumerate([(0.9, 1.0), (0.8, 0.95)])
        for name, steps, accuracy in (("few-step student", 4, ours), ("teacher", 50, theirs))
    ]
    assert lost(rows, 4).tolist() == pytest.approx([-0.1, -0.15])


@pytest.mark.parametrize(
    ("ours", "seconds", "said"),
    [
        ([0.98, 0.97, 0.99], 0.5, "holds"),
        ([0.80, 0.81, 0.79], 0.5, "refuted"),
        ([0.98, 0.97, 0.99], 1.5, "refuted"),
        ([0.98, 0.80, 0.99], 0.5, "open"),
        ([0.98], 0.5, "open"),
    ],
)
def test_the_falsifier_decides(ours, seconds, said):
    """Slower than twelve times, or an interval wholly below five points, refutes the claim."""
    rows = [
        {"pipeline": name, "steps": steps, "seed": seed, "accuracy": accuracy}
        for seed, found in enumerate(ours)
        for name, steps, accuracy in ((few_steps.FEW, 4, found), ("teacher", 50, 0.98))
    ]
    times = {("teacher", 50): 12.0, (few_steps.SHIPPED, 50): 8.0, (few_steps.SHIPPED, 4): 2.0}
    times[few_steps.FEW, 4] = seconds
    times = [{"pipeline": n, "steps": s, "median": t} for (n, s), t in times.items()]
    assert few_steps.verdict(rows, times, 4) == said
