"""Which plans fit a budget, and which of them lose the least: the knapsack, solved exactly.

There are twelve parts that can be left out, so it is solved by trying every subset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from diffusers import UNet2DConditionModel

from kdc.unet.blocks import INNERMOST, every_subset, kept_blocks, plan_without
from kdc.unet.costs import count_costs, time_blocks
from kdc.unet.plans import STAGES
from kdc.unet.slimming import slim


@dataclass(frozen=True)
class Budget:
    """The most a student may cost: parameters, multiply-accumulates, or time over the teacher's.

    Several may be set and all must hold. Raises `ValueError` when none is, or one is not positive.
    """

    parameters: float | None = None
    macs: float | None = None
    latency: float | None = None

    def __post_init__(self):
        limits = [value for value in vars(self).values() if value is not None]
        if not limits or any(value <= 0 for value in limits):
            raise ValueError(f"a budget needs a positive limit, not {self}")

    def allows(self, costs: pd.DataFrame) -> pd.Series:
        """Which rows of a table with columns `parameters`, `macs`, `latency` fit."""
        fits = pd.Series(True, costs.index)
        for name, limit in vars(self).items():
            if limit is not None:
                fits &= costs[name] <= limit
        return fits


def block_seconds(unet: UNet2DConditionModel, **inputs) -> dict[bool, pd.Series]:
    """Measured seconds of every block, by the teacher's names: as it is, and (key True) without
    the innermost stage, where the mid-block works at twice the resolution.

    `inputs` are `size`, `sequence_length` and `batch_size` as in `count_costs`.
    """
    seconds = {}
    for dropped, parts in ((False, ()), (True, (INNERMOST,))):
        table = time_blocks(slim(unet, plan_without(parts)), **inputs)
        seconds[dropped] = table.rename(lambda name, d=dropped: _of_teacher(name, d))
    return seconds


def cost_every_subset(
    unet: UNet2DConditionModel, seconds: Mapping[bool, pd.Series] | None = None, **inputs
) -> pd.DataFrame:
    """`parameters`, `macs` and, with `seconds`, `latency` (over the teacher's) of every subset.

    Rows are the subsets of `every_subset`, as tuples. A block costs the same in every plan, but for
    the mid-block, which works at twice the resolution where the innermost stage is dropped; so the
    costs of blocks are counted on both. `seconds` come from `block_seconds`, and `inputs` are those
    of `count_costs`; `unet` may be on the meta device. Predicted latency leaves out how blocks
    affect one another: measure the winner.
    """
    tables = {}
    for dropped, parts in ((False, ()), (True, (INNERMOST,))):
        table = count_costs(_on_meta(unet, parts), **inputs).drop("total")[["parameters", "macs"]]
        tables[dropped] = table.rename(lambda name, d=dropped: _of_teacher(name, d))
        if seconds is not None:
            timed = seconds[dropped].rename("latency") / seconds[False].sum()
            tables[dropped] = tables[dropped].join(timed, how="outer").fillna(0.0)
    values = {dropped: table.to_numpy() for dropped, table in tables.items()}
    place = {d: {name: row for row, name in enumerate(t.index)} for d, t in tables.items()}
    rows = {}
    for subset in every_subset():
        plan = plan_without(subset)
        dropped = plan.dropped > 0
        kept = [place[dropped][name] for name in kept_blocks(plan) if name in place[dropped]]
        rows[subset] = values[dropped][kept].sum(axis=0)
    costs = pd.DataFrame(list(rows.values()), columns=tables[False].columns)
    costs.index = pd.Index(list(rows), tupleize_cols=False)
    return costs


def full_plans(costs: pd.DataFrame, budget: Budget) -> list[tuple[str, ...]]:
    """The subsets that use the budget up: they fit, and would not with one part more kept.

    A part is also a single layer of a dropped stage. Every plan that fits keeps less than one of
    these, so these are the plans to look at. Raises `ValueError` where no plan fits.
    """
    fitting = costs.index[budget.allows(costs)].tolist()
    if not fitting:
        least = ", ".join(f"{name} {costs[name].min():,.3g}" for name in costs)
        raise ValueError(f"no plan fits {budget}; the least that plans can cost is {least}")
    sets = {frozenset(subset) for subset in fitting}

    def full(subset: frozenset[str]) -> bool:
        larger = [subset - {part} for part in subset]
        if INNERMOST in subset:
            larger.append(subset - {INNERMOST} | {f"layer {STAGES - 1}"})
        return not any(other in sets for other in larger)

    return [subset for subset in fitting if full(frozenset(subset))]


def rank_plans(scores: pd.Series, costs: pd.DataFrame, budget: Budget) -> pd.DataFrame:
    """The costs of all `full_plans`, the least sum of scores first: the knapsack, solved exactly.

    `scores` gives each part of `PARTS` its sensitivity. Raises `ValueError` where no plan fits.
    """
    full = set(full_plans(costs, budget))
    ranked = costs[[subset in full for subset in costs.index]].copy()
    ranked["score"] = [sum(scores[part] for part in subset) for subset in ranked.index]
    return ranked.sort_values("score", kind="stable")


def random_plans(
    costs: pd.DataFrame, budget: Budget, count: int, generator: torch.Generator
) -> list[tuple[str, ...]]:
    """Subsets drawn evenly, without repetition, from `full_plans`: what a search has to beat.

    Raises `ValueError` where there are fewer than `count`.
    """
    candidates = full_plans(costs, budget)
    if len(candidates) < count:
        raise ValueError(f"only {len(candidates)} plans use up {budget}, not {count}")
    order = torch.randperm(len(candidates), generator=generator)[:count]
    return [candidates[index] for index in order.tolist()]


def _on_meta(unet: UNet2DConditionModel, parts: tuple[str, ...]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return slim(UNet2DConditionModel.from_config(unet.config), plan_without(parts))


def _of_teacher(name: str, dropped: int) -> str:
    """A student's block by its teacher's name, where `dropped` inner stages are left out."""
    parts = name.split(".")
    if parts[0] == "up_blocks":
        parts[1] = str(int(parts[1]) + dropped)
    return ".".join(parts)
