"""What each part of a U-Net is worth, and the best plan that a budget allows.

There are twelve parts that can be left out, so the knapsack is solved by trying every subset.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tqdm.auto import tqdm

from kdc.costs import call_of, count_costs, measure_latency, time_blocks
from kdc.data import LatentDataset
from kdc.distillation import distill, output_error
from kdc.parts import INNERMOST, PARTS, every_subset, kept_blocks, plan_without
from kdc.slimming import STAGES, SlimPlan, slim


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

    `inputs` are `size`, `words` and `batch_size` as in `count_costs`.
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
    rows = {}
    for subset in every_subset():
        plan = plan_without(subset)
        rows[subset] = tables[plan.dropped > 0].reindex(kept_blocks(plan)).sum()
    costs = pd.DataFrame(list(rows.values()))
    costs.index = pd.Index(list(rows), tupleize_cols=False)
    return costs


def sensitivity(
    teacher: StableDiffusionPipeline,
    data: LatentDataset,
    *,
    draws: int = 4,
    count: int = 16,
    levels: int = 8,
    guidance: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Output error of the teacher with one part left out: `part`, `timestep`, `draw`, `error`.

    Every draw has pictures, captions and noise of its own, the same for all parts; the spread over
    draws is that of the estimate. `guidance` is that of `output_error`.
    """
    rows = []
    for part in tqdm(PARTS, desc="sensitivity", mininterval=2):
        student = slim(teacher.unet, plan_without([part]))
        for draw in range(draws):
            errors = output_error(
                student,
                teacher,
                data,
                count=count,
                levels=levels,
                guidance=guidance,
                seed=seed * 1000 + draw,
            )
            rows += [
                {"part": part, "timestep": t, "draw": draw, "error": e} for t, e in errors.items()
            ]
    return pd.DataFrame(rows)


def full_plans(costs: pd.DataFrame, budget: Budget) -> list[tuple[str, ...]]:
    """The subsets that use the budget up: they fit, and would not with one part more kept.

    A part is also a single layer of a dropped stage. Every plan that fits keeps less than one of
    these, so these are the plans worth asking about. Raises `ValueError` where no plan fits.
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


def search_plan(
    teacher: StableDiffusionPipeline,
    data: LatentDataset,
    budget: Budget,
    *,
    scores: pd.Series | None = None,
    costs: pd.DataFrame | None = None,
    test_data: LatentDataset | None = None,
    heats: Sequence[tuple[int, int]] = ((12, 30), (4, 90)),
    batch_size: int = 16,
    count: int = 48,
    guidance: float = 7.5,
    seed: int = 0,
    **inputs,
) -> tuple[SlimPlan, pd.DataFrame]:
    """The best plan within the budget, and the table of the finalists.

    Parts are scored by `sensitivity` (unless `scores`, measured at that `guidance`, are given), the
    knapsack is solved exactly, and its best plans are judged by a short recovery, because the
    lowest error right after the cut does not decide (Fang et al., arXiv 2412.01199). `heats` says
    how: (12, 30) lets twelve plans recover for 30 distillation steps each, and the best of them
    enter the next heat, which starts afresh from the cut (successive halving, Jamieson & Talwalkar,
    arXiv 1502.07943).

    Errors are `output_error` on `count` pictures of `test_data` (default: `data`) at `guidance`,
    which should be that of the sampler: without guidance, parts that serve the caption seem to be
    worth little. The table has the plans of the last heat, best first: costs, `score`, and the
    error `after_cut` and `recovered`. With a latency budget the entrants are measured as well, and
    those above it fall out. `costs`, from `cost_every_subset`, holds the budget against another
    U-Net of the layout than the teacher's, say one of full size; nothing is measured then. Raises
    `ValueError` where no plan fits.
    """
    if not heats or min(min(heat) for heat in heats) < 1:
        raise ValueError(f"every heat needs a plan and a step at least, not {heats}")
    measure = costs is None and budget.latency is not None
    if costs is None:
        seconds = block_seconds(teacher.unet, **inputs) if measure else None
        costs = cost_every_subset(teacher.unet, seconds, **inputs)
    if scores is None:
        full_plans(costs, budget)  # a budget too small fails before work
        rows = sensitivity(teacher, data, guidance=guidance, seed=seed)
        scores = rows.groupby("part")["error"].mean()
    entrants = rank_plans(scores, costs, budget).head(heats[0][0])
    if measure:
        entrants = _measured(teacher.unet, entrants, budget, **inputs)
    table = entrants.assign(plan=[plan_without(subset) for subset in entrants.index])
    table = table.reset_index(drop=True)
    error = functools.partial(
        output_error,
        teacher=teacher,
        data=data if test_data is None else test_data,
        count=count,
        guidance=guidance,
    )
    for plans, steps in heats:
        table = table.head(plans).copy()
        for row, plan in table["plan"].items():
            student = slim(teacher.unet, plan)
            table.loc[row, "after_cut"] = error(student).mean()
            settings = {"steps": steps, "batch_size": batch_size, "seed": seed}
            distill(student, teacher, data, **settings, label=plan.name)
            table.loc[row, "recovered"] = error(student).mean()
        table = table.sort_values("recovered", ignore_index=True)
    return table.loc[0, "plan"], table


def _measured(unet, entrants: pd.DataFrame, budget: Budget, **inputs) -> pd.DataFrame:
    """The entrants with their measured latency; those over the budget left out."""
    ratios = []
    for subset in entrants.index:  # one at a time, for the sake of memory at full size
        calls = (call_of(one, **inputs) for one in (unet, slim(unet, plan_without(subset))))
        times = measure_latency(
            dict(zip(("teacher", "student"), calls, strict=True)), device=unet.device
        )
        ratios.append(times.loc["student", "ratio"])
    measured = entrants.assign(latency=ratios)
    if not (fits := budget.allows(measured)).any():
        raise ValueError(
            f"predicted to fit {budget}, the entrants were measured at latencies "
            f"{', '.join(f'{ratio:.3f}' for ratio in ratios)}: let more enter, or raise the budget"
        )
    return measured[fits]


def _on_meta(unet: UNet2DConditionModel, parts: tuple[str, ...]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return slim(UNet2DConditionModel.from_config(unet.config), plan_without(parts))


def _of_teacher(name: str, dropped: int) -> str:
    """A student's block by its teacher's name, where `dropped` inner stages are left out."""
    parts = name.split(".")
    if parts[0] == "up_blocks":
        parts[1] = str(int(parts[1]) + dropped)
    return ".".join(parts)
