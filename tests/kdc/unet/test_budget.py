import itertools
import random

import pandas as pd
import pytest
import torch

import kdc
from kdc.unet.blocks import INNERMOST, PARTS, every_subset, kept_blocks, plan_without
from kdc.unet.budget import Budget, block_seconds, cost_every_subset, random_plans, rank_plans
from kdc.unet.costs import block_of, count_costs
from kdc.unet.plans import PLANS
from kdc.unet.slimming import copy_map

LAYERS = [f"layer {stage}" for stage in range(4)]
NAMED = {
    "full": [],
    "bk-base": LAYERS,
    "kdc": [*LAYERS, "mid-block"],
    "kdc-v2": [*LAYERS[:3], INNERMOST],
    "bk-tiny": [*LAYERS[:3], INNERMOST, "mid-block"],
}


@pytest.mark.parametrize("name", NAMED)
def test_the_named_plans_are_subsets_of_the_parts(name):
    assert plan_without(NAMED[name]) == PLANS[name]


def test_every_subset_is_a_plan_of_its_own():
    plans = [plan_without(subset) for subset in every_subset()]
    assert len(plans) == len(set(plans)) == 2**12 - 2**10
    with pytest.raises(ValueError, match="unknown parts .*'roof'"):
        plan_without(["roof"])


def test_kept_blocks_are_those_that_a_student_copies(tiny_unet):
    for subset in random.Random(0).sample(every_subset(), 12):
        plan = plan_without(subset)
        sources = {block_of(source) for source in copy_map(tiny_unet, plan).values()}
        assert sources == set(kept_blocks(plan)) - {"other"}, subset


@pytest.mark.long
def test_predicted_costs_are_those_of_the_student_that_is_cut(tiny_unet):
    """The oracle: cut the student and count it. Exact, the shifted mid-block included."""
    inputs = {"size": 16, "sequence_length": 5}
    costs = cost_every_subset(tiny_unet, **inputs)
    some = random.Random(1).sample(every_subset(), 10)
    for subset in [*map(tuple, NAMED.values()), *some]:
        counted = count_costs(kdc.slim(tiny_unet, plan_without(subset)), **inputs).loc["total"]
        row = costs.iloc[[set(s) for s in costs.index].index(set(subset))]
        assert row["parameters"] == counted["parameters"]
        assert row["macs"] == counted["macs"], subset


def test_the_knapsack_is_solved_exactly():
    """Against a brute force written another way, on additive costs."""
    g = torch.Generator().manual_seed(0)
    scores = pd.Series(torch.rand(len(PARTS), generator=g).tolist(), PARTS)
    importance = dict(zip(PARTS, torch.rand(len(PARTS), generator=g).tolist(), strict=True))
    subsets = every_subset()
    costs = pd.DataFrame({"macs": [10 - sum(importance[p] for p in s) for s in subsets]})
    costs.index = pd.Index(subsets, tupleize_cols=False)
    best = rank_plans(scores, costs, Budget(macs=8.0))
    expected = min(
        sum(scores[p] for p, out in zip(PARTS, choice, strict=True) if out)
        for choice in itertools.product([False, True], repeat=len(PARTS))
        if 10 - sum(importance[p] for p, out in zip(PARTS, choice, strict=True) if out) <= 8
        and not (choice[PARTS.index(INNERMOST)] and choice[PARTS.index("layer 3")])
    )
    assert best["score"].iloc[0] == pytest.approx(expected)
    assert (best["macs"] <= 8).all() and best["score"].is_monotonic_increasing


def test_a_budget_must_say_something_and_be_possible(tiny_unet):
    for wrong in ({}, {"macs": 0}, {"parameters": -1}):
        with pytest.raises(ValueError, match="positive limit"):
            Budget(**wrong)
    costs = cost_every_subset(tiny_unet, size=16, sequence_length=5)
    with pytest.raises(ValueError, match="no plan fits .*the least that plans can cost"):
        rank_plans(pd.Series(0.0, PARTS), costs, Budget(parameters=10))


def test_random_plans_use_the_budget_up(tiny_unet):
    """Against the definition by kept blocks: no larger network fits."""
    costs = cost_every_subset(tiny_unet, size=16, sequence_length=5)
    limit = 0.6 * costs["macs"].max()
    generator = torch.Generator().manual_seed(0)
    generated = random_plans(costs, Budget(macs=limit), 12, generator)
    assert len(set(generated)) == 12
    kept = {subset: set(kept_blocks(plan_without(subset))) for subset in costs.index}
    macs = dict(zip(costs.index, costs["macs"], strict=True))
    for subset in generated:
        assert macs[subset] <= limit
        assert not [s for s in kept if kept[s] > kept[subset] and macs[s] <= limit], subset
    again = random_plans(costs, Budget(macs=limit), 5, torch.Generator().manual_seed(0))
    assert again == generated[:5]
    with pytest.raises(ValueError, match=r"only \d+ plans use up"):
        random_plans(costs, Budget(macs=limit), 3000, generator)


def test_block_times_become_predicted_latencies(tiny_unet):
    """Invented times: the mid-block takes half of all; without the innermost stage, twice that."""
    inputs = {"size": 16, "sequence_length": 5}
    timed = block_seconds(tiny_unet, **inputs)
    assert set(timed[False].index) >= set(kept_blocks(PLANS["full"])) - {"other"}
    assert not [b for b in timed[True].index if b.startswith(("down_blocks.3", "up_blocks.0"))]
    seconds = {}
    for dropped, times in timed.items():
        mid = times.index.str.startswith("mid_block")
        seconds[dropped] = times.where(mid, 1 / (~mid).sum())
        seconds[dropped][mid] = (2 if dropped else 1) / mid.sum()
    costs = cost_every_subset(tiny_unet, seconds, **inputs)
    latency = {frozenset(s): value for s, value in costs["latency"].items()}
    assert latency[frozenset()] == pytest.approx(1)
    assert latency[frozenset({"mid-block"})] == pytest.approx(0.5)
    assert latency[frozenset({INNERMOST})] == pytest.approx(1.5)
    assert latency[frozenset({INNERMOST, "mid-block"})] == pytest.approx(0.5)
