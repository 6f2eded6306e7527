import functools

import pandas as pd
import pytest
import torch

import kdc
from kdc import search
from kdc.search import recovered_importance, search_plan, sensitivity
from kdc.unet.blocks import PARTS, plan_without
from kdc.unet.budget import Budget, cost_every_subset
from kdc.unet.plans import PLANS


@pytest.fixture(scope="module")
def data(teacher):
    return kdc.cache_latents(teacher, kdc.load_dataset("worlds", count=32))


def test_sensitivity_is_the_error_of_bypassing_the_part(teacher, data):
    table = sensitivity(teacher, data, draws=2, count=4, levels=2, seed=3)
    assert len(table) == len(PARTS) * 2 * 2 and (table["error"] > 0).all()
    student = kdc.slim(teacher.unet, plan_without(["mid-block"]))
    errors = kdc.output_error(student, teacher, data, count=4, levels=2, seed=3001)
    mine = table[(table["part"] == "mid-block") & (table["draw"] == 1)]
    assert mine["error"].tolist() == errors.tolist()


def test_the_importance_after_recovery_is_the_judges_word_on_the_student_trained_without_the_part(
    teacher, data, monkeypatch
):
    monkeypatch.setattr(search, "PARTS", ("layer 0", "mid-block"))
    seen = []

    def judge(student):
        seen.append(student)
        return float(len(seen))

    importance = recovered_importance(teacher, data, judge, steps=1, batch_size=2, seed=3)
    assert importance.to_dict() == {"layer 0": 1.0, "mid-block": 2.0}  # the whole network got 1
    twin = kdc.slim(teacher.unet, plan_without(["mid-block"]))
    kdc.distill(twin, teacher, data, steps=1, batch_size=2, seed=3)
    ours, theirs = seen[2].state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_judge_decides(teacher, data):
    """By a judge who likes large networks, the larger of two entrants wins whatever it draws."""
    scores = pd.Series(range(1, 13), PARTS, dtype=float)

    def size(student):
        return -float(sum(p.numel() for p in student.parameters()))

    plan, table = search_plan(
        teacher, data, Budget(parameters=5_000_000), scores=scores, judge=size,
        halving_rounds=((4, 1),), batch_size=2, sequence_length=24,
    )  # fmt: skip
    assert plan == table.loc[0, "plan"] and table["parameters"].is_monotonic_decreasing
    assert table["parameters"].nunique() > 1


@pytest.mark.long
def test_a_search_ends_within_the_budget_with_the_best_of_the_finalists(teacher, data, monkeypatch):
    in_two_steps = functools.partial(search.drawing_judge, steps=2)
    monkeypatch.setattr(search, "drawing_judge", in_two_steps)  # the default, only faster
    limit = 5_000_000
    budget = Budget(parameters=limit)
    plan, table = search_plan(
        teacher, data, budget, halving_rounds=((3, 1), (2, 2)), batch_size=2, sequence_length=24,
        scores=pd.Series(range(1, 13), PARTS, dtype=float),
    )  # fmt: skip
    student = kdc.slim(teacher.unet, plan)
    assert sum(p.numel() for p in student.parameters()) == table.loc[0, "parameters"] <= limit
    assert plan == table.loc[0, "plan"] and table["recovered"].is_monotonic_increasing
    assert len(table) == 2 and table[["after_cut", "recovered"]].gt(0).all(axis=None)


def test_a_search_can_be_held_against_the_costs_of_another_network(teacher, data, tiny_unet):
    other = cost_every_subset(tiny_unet, size=16, sequence_length=5)
    limit = 0.5 * other["parameters"].max()
    scores = pd.Series(range(1, 13), PARTS, dtype=float)
    plan, table = search_plan(
        teacher, data, Budget(parameters=limit), costs=other, batch_size=2,
        halving_rounds=((1, 1),),
        scores=scores, judge=lambda student: 0.0,
    )  # fmt: skip
    counted = sum(p.numel() for p in kdc.slim(tiny_unet, plan).parameters())
    assert table.loc[0, "parameters"] == counted <= limit


@pytest.mark.long
def test_a_latency_budget_is_predicted_and_then_measured(teacher, data, monkeypatch):
    """What a clock says is a benchmark's business: here the measuring says what it shall."""
    said = iter((1.2, 0.9))

    def measured(candidates, device):
        assert list(candidates) == ["teacher", "student"]
        for call in candidates.values():
            call()
        return pd.DataFrame({"ratio": {"teacher": 1.0, "student": next(said)}})

    monkeypatch.setattr(search, "measure_latency", measured)
    scores = pd.Series(1.0, PARTS)
    plan, table = search_plan(
        teacher,
        data,
        Budget(latency=0.95),
        scores=scores,
        halving_rounds=((2, 1),),
        judge=lambda student: 0.0,
        batch_size=2,
        sequence_length=24,
    )
    assert table["latency"].tolist() == [0.9] and plan != PLANS["full"], "1.2 is over the budget"
    with pytest.raises(ValueError, match="a plan and a step"):
        search_plan(teacher, data, Budget(latency=0.9), halving_rounds=((4, 0),))
    with pytest.raises(ValueError, match="no plan fits"):
        search_plan(teacher, data, Budget(latency=0.01), scores=scores, sequence_length=24)
