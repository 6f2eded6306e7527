import json

import pandas as pd
import pytest
import torch

import kdc
from kdc.unet.blocks import group_of, plan_without
from kdc.unet.costs import count_costs
from kdc.unet.plans import PLANS
from studies.common.claims import check
from studies.common.protocol import compare_rows
from studies.slimming import report


def rows(candidate, seeds, values) -> pd.DataFrame:
    return pd.DataFrame(
        {"candidate": candidate, "seed": seeds, "output_error": values, "accuracy": values}
    )


def test_candidates_with_other_seeds_are_compared_by_welch():
    """Closed form: variances 1 and 4, three each, so by Welch and Satterthwaite
    (5/3)^2 / ((1/3)^2 / 2 + (4/3)^2 / 2) = 50/17 degrees of freedom."""
    table = pd.concat([rows("a", [0, 1, 2], [1.0, 2, 3]), rows("b", [5, 6, 7], [10.0, 12, 14])])
    result = compare_rows(table, "a", "b")
    half = 3.21876 * (5 / 3) ** 0.5  # Student's t for 97.5 % at 50/17 degrees of freedom
    for measure, verdict in (("output_error", "better"), ("accuracy", "worse")):
        one = result.loc[measure]
        assert one["mean"] == pytest.approx(-10) and one["n"] == "3 + 3"
        assert one["low"] == pytest.approx(-10 - half, abs=1e-4)
        assert one["high"] == pytest.approx(-10 + half, abs=1e-4)
        assert one["verdict"] == verdict
    lone = pd.concat([rows("a", [0], [1.0]), rows("b", [5], [9.0])])
    assert set(compare_rows(lone, "a", "b")["verdict"]) == {"open"}


def test_candidates_with_common_seeds_are_compared_in_pairs():
    table = pd.concat([rows("a", [0, 1, 9], [1.0, 2, 99]), rows("b", [0, 1], [2.0, 3.1])])
    one = compare_rows(table, "a", "b").loc["output_error"]
    assert one["mean"] == pytest.approx(-1.05) and one["n"] == 2


def test_claims_are_about_kdc_the_random_plans_of_the_budget_and_the_published_order():
    names = ["kdc", "random: macs", "found: macs", "found: time"]
    table = pd.concat([rows(name, [0, 1], [1.0, 2]) for name in names])
    checked = check(table, report.claims(names[2:]))
    made = checked[["candidate", "baseline"]].drop_duplicates().to_numpy().tolist()
    assert made == [
        ["found: macs", "kdc"],
        ["found: macs", "random: macs"],
        ["found: time", "kdc"],
    ]
    assert "multiply-accumulates" in checked["claim"][0]
    order = [(c.candidate, c.baseline) for c in report.claims([]) if c.measure == "accuracy"]
    assert order == [("bk-base", "kdc"), ("kdc", "bk-tiny")]


def test_blocks_have_the_teachers_names_and_the_students_costs(tiny_unet):
    plan = plan_without(["stage 3", "layer 1"])
    table = report.blocks_of(tiny_unet, plan)
    total = count_costs(kdc.slim(tiny_unet, plan)).loc["total"]
    assert (table.sum() == total).all()
    whole = report.blocks_of(tiny_unet, "full")
    up = "up_blocks.2.resnets.2"  # the student's up_blocks.1.resnets.1
    assert up in table.index and "up_blocks.2.resnets.1" not in table.index
    assert table.loc[up, "parameters"] == whole.loc[up, "parameters"]
    both = report.side_by_side({"full": whole, "cut": table}, "macs")
    assert both["cut"].isna().sum() == len(whole) - len(table)
    groups = whole.groupby(group_of)["parameters"].sum()
    assert groups.sum() == whole["parameters"].sum()
    assert groups["stage 0, transformers"] == sum(
        whole.loc[f"{side}.attentions.{i}", "parameters"]
        for side, count in (("down_blocks.0", 2), ("up_blocks.3", 3))
        for i in range(count)
    )
    counted = report.count_table({"full": whole}, {"full": whole["parameters"].sum() + 1})
    assert counted.loc["full", "equal"] == "NO"


def test_only_plans_within_both_limits_are_named():
    timed = pd.DataFrame(
        {"parameter_ratio": [1, 0.56, 0.5, 0.5, 0.6], "ratio": [1, 0.6, 0.45, 0.46, 0.4]},
        index=["full", "kdc", "fast", "slow", "large"],
    )
    assert report.within(timed, ["fast", "slow", "large"]) == ["fast"]


def test_the_winner_of_a_halving_round_is_placed_by_the_other_judgements():
    finalists = [
        {"plan": "b", "score": 2.0, "after_cut": 9.0, "recovered": 0.1},
        {"plan": "a", "score": 1.0, "after_cut": 8.0, "recovered": 0.2},
        {"plan": "c", "score": 3.0, "after_cut": 7.0, "recovered": 0.3},
    ]
    row = report.last_rounds({"x": {"finalists": finalists}}).loc["x"]
    assert row.tolist() == [3, 2, 3, 9.0, 0.1, 0.3]


def test_a_study_of_ones_own_has_what_the_stored_one_has(teacher, tmp_path, monkeypatch):
    """With the recovery, the search and the timing replaced: they have tests of their own."""
    plan = plan_without(["mid-block"], "found: macs")
    study = report.study
    settings = study.Settings(seeds=(3, 4), fresh_seeds=(), images=2, test_images=2)
    timed = pd.DataFrame(
        {"parameters": 10.0, "macs": 10.0, "ratio": 0.5}, index=[*PLANS, plan.name]
    )
    found = {plan.name: {"plan": json.loads(json.dumps(plan.to_dict())), "finalists": []}}
    asked = {}

    def recover(setup, candidates, settings, folder):
        asked.update(candidates)
        pairs = [(name, seed) for name, plans in candidates.items() for seed in plans]
        table = pd.DataFrame(pairs, columns=["candidate", "seed"])
        return table.assign(parameters=5, macs=2, output_error=torch.rand(len(pairs)).numpy())

    monkeypatch.setattr(study, "find_plans", lambda *_: found)
    monkeypatch.setattr(study, "recover", recover)
    control = {"random: macs": {seed: plan for seed in settings.seeds}}
    monkeypatch.setattr(study, "random_control", lambda *_: control)
    monkeypatch.setattr(report.stages, "full_size_costs", pd.DataFrame)
    monkeypatch.setattr(report.full_size, "time_plans", lambda *_, **__: timed)
    made = report.measured(teacher, "flora", {}, settings, tmp_path)
    assert made.found == {plan.name: plan}
    assert set(asked) == {"bk-base", "kdc", "kdc-v2", "bk-tiny", plan.name, "random: macs"}
    assert all(set(plans) == {3, 4} for plans in asked.values())
    mine = made.rows.set_index("candidate").loc[plan.name].iloc[0]
    assert mine[["parameter_ratio", "mac_ratio", "latency_ratio"]].tolist() == [0.5, 0.2, 0.5]
    assert made.rows.set_index("candidate").loc["random: macs", "latency_ratio"].isna().all()


def test_the_stored_study_is_whole():
    """Every plan that was followed is measured and timed at full size; the guided ones were not."""
    study = report.stored()
    assert set(study.followed) <= set(study.rows["candidate"]) & set(study.timed.index)
    left = set(study.found) - set(study.followed)
    assert left and all(name.startswith("guided") for name in left)
    assert {"seed", "accuracy", "fd"} <= set(study.teacher.columns)
