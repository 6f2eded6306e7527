"""What chapter 06 says of stored numbers, on numbers made up so that the answer is known."""

import pytest

from studies.common import ledger
from studies.evaluation import report
from studies.evaluation.study import SHIPPED

LABEL = f"{SHIPPED}, ddim, 4 steps"


def scores(accuracy, clip, fid=1.0):
    values = {"accuracy": accuracy, "clip": clip, "fd": fid, "diversity": None}
    return {
        name: {
            "value": value,
            "spread": 0.1,
            "samples": 144,
            "real_vs_real": 0.5 if name == "fd" else None,
        }
        for name, value in values.items()
    }


def verdict(text, p=0.5, difference=-0.5):
    return {"difference": difference, "p": p, "verdict": text}


def steps(accuracy=0.95, ratio=0.2, clip="not distinguishable"):
    rows = [("teacher", 50, 1.0), (SHIPPED, 4, accuracy)]
    return {
        "sweep": [
            {"pipeline": n, "scheduler": "ddim", "steps": s, "accuracy": a, "clip": 90.0}
            for n, s, a in rows
        ],
        "chosen": [
            {
                "pipeline": SHIPPED,
                "scheduler": "ddim",
                "steps": 4,
                "ratio": ratio,
                "rules": ["best"],
            }
        ],
        "tables": {"teacher": scores(1.0, 90), LABEL: scores(accuracy, 89.5)},
        "compared": {LABEL: {"accuracy": verdict("worse"), "clip": verdict(clip)}},
    }


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [True, True, True]),
        ({"ratio": 0.21}, [False, True, True]),
        ({"accuracy": 0.94}, [True, False, True]),
        ({"clip": "worse"}, [True, True, False]),
    ],
)
def test_each_goal_is_met_or_missed_by_its_own_number(changed, expected):
    found = report.goals(steps(**changed))
    assert [met for met, _ in found.values()] == expected
    assert LABEL in next(iter(found.values()))[1]


def test_without_a_setting_that_is_good_enough_the_claim_fails():
    none = steps() | {"chosen": [steps()["chosen"][0] | {"pipeline": "teacher"}]}
    assert [met for met, _ in report.goals(none).values()] == [False]
    assert [met for met, _ in report.goals(steps(), "fastest").values()] == [False]


def test_the_headline_table_has_speed_scores_and_verdicts():
    table = report.headline_table(steps())
    assert table.loc["times as fast"].tolist() == [1.0, 5.0]
    assert table.loc["chosen as"].tolist() == ["", "best"]
    assert table.loc["accuracy", LABEL] == 0.95 and table.loc["clip: verdict", LABEL]
    assert "diversity" not in table.index


def test_the_frontier_has_the_time_of_each_setting():
    clock = [
        {"pipeline": n, "steps": s, "batch_size": b, "median": m, "ratio": m / 5}
        for n, s, m in (("teacher", 50, 5.0), (SHIPPED, 4, 1.0))
        for b in (1, 8)
    ]
    rows = report.frontier(steps(), {"images": clock})
    assert rows["median"].tolist() == [5.0, 1.0] and len(rows) == 2
    assert report.curves_of(rows, "accuracy")[f"{SHIPPED}, ddim"] == ([1.0], [0.95])


def table():
    return {
        "tables": {"teacher": scores(1.0, 90), SHIPPED: scores(0.97, 89, fid=3.0)},
        "retraining": {
            "corrected": {"accuracy": {"mean": 0.8, "retraining": 0.02, "sampling": 0.01}}
        },
        "compared": {f"{SHIPPED} - teacher": {"accuracy": verdict("worse", p=0.01)}},
    }


def test_spreads_of_retraining_and_sampling_stand_apart():
    shown = report.equal_steps(table())
    assert shown.loc["accuracy", "corrected"] == "0.8 (0.02, 0.01)"
    assert shown.loc["accuracy", "teacher"] == "1 ± 0.1" and shown.loc["recall", "teacher"] == ""
    assert shown.loc["fd", "real against real"] == "0.5"
    assert report.verdicts(table()).iloc[0, 0] == "worse (p = 0.010)"


def test_plans_have_scores_and_full_size_costs():
    rows = report.plans()
    assert {"bk-base", "kdc", "kdc-v2", "bk-tiny", "found: macs"} <= set(rows["candidate"])
    assert not any(name.startswith("random") for name in rows["candidate"])
    kdc = rows[rows["candidate"] == "kdc"]
    assert kdc["parameter_ratio"].iloc[0] == pytest.approx(482_346_884 / 859_520_964)
    assert rows["latency_ratio"].notna().all()


def test_the_paper_stands_beside_counts_that_compare_and_scores_that_do_not():
    shown = report.beside_the_paper()
    counts = shown[shown["comparable"].str.startswith("yes")]
    assert (counts["published"] == counts["ours"]).all() and len(counts) == 2
    assert shown["comparable"].str.startswith("no").sum() == 3
    grades = ledger.read("mini_grades")
    assert f"{grades['student']['clip_score'] / 100:.3f} (teacher" in shown["ours"].iloc[-1]
