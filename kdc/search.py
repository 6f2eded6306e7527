"""What each part of a U-Net is worth, and the best plan that a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tqdm.auto import tqdm

from kdc.data.latents import LatentDataset
from kdc.distillation.distill import distill
from kdc.distillation.fidelity import drawing_judge, output_error
from kdc.unet.blocks import PARTS, plan_without
from kdc.unet.budget import Budget, block_seconds, cost_every_subset, full_plans, rank_plans
from kdc.unet.costs import call_of, measure_latency
from kdc.unet.plans import SlimPlan
from kdc.unet.slimming import slim

Judge = Callable[[UNet2DConditionModel], float]  # of a student; lower is better


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

    Every draw has images, captions and noise of its own, the same for all parts; the spread over
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


def recovered_importance(
    teacher: StableDiffusionPipeline,
    data: LatentDataset,
    judge: Judge,
    *,
    steps: int = 40,
    batch_size: int = 16,
    seed: int = 0,
) -> pd.Series:
    """For every part, what `judge` says of a student without it after `steps` of distillation.

    Less what it says of one that lost nothing and trained as long, which is not nothing: training
    moves every student. What bypassing a part breaks and what its absence costs in the end are
    different things: other layers learn to do some parts' work in a few steps, and never that of
    others. Values below 0 are the judge's noise.
    """
    judged = {}
    for part in tqdm((None, *PARTS), desc="importance after recovery", mininterval=2):
        student = slim(teacher.unet, plan_without([part] if part else []))
        settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": seed}
        distill(student, teacher, data, **settings, label=f"without {part or 'loss'}")
        judged[part] = judge(student)
    return pd.Series({part: judged[part] - judged[None] for part in PARTS})


def search_plan(
    teacher: StableDiffusionPipeline,
    data: LatentDataset,
    budget: Budget,
    *,
    scores: pd.Series | None = None,
    costs: pd.DataFrame | None = None,
    judge: Judge | None = None,
    halving_rounds: Sequence[tuple[int, int]] = ((6, 60), (3, 120)),
    batch_size: int = 16,
    seed: int = 0,
    **inputs,
) -> tuple[SlimPlan, pd.DataFrame]:
    """The best plan within the budget, and the table of the finalists.

    Parts are scored by `recovered_importance` (unless `scores` are given), the knapsack is solved
    exactly, and its best plans are judged by a short recovery, because the lowest error right after
    the cut does not decide (Fang et al., arXiv 2412.01199). `halving_rounds` says how: (6, 60) lets
    six plans recover for 60 distillation steps each, and the best of them enter the next round,
    which starts afresh from the cut (successive halving, Jamieson & Talwalkar, arXiv 1502.07943).

    `judge` takes a student and returns a number, lower is better; the default is `drawing_judge` on
    up to 32 captions of `data`. The table has the plans of the last round, best first: costs,
    `score`, and what the judge says `after_cut` and `recovered`. With a latency budget the plans of
    the first round are measured as well, and those above it fall out. `costs`, from
    `cost_every_subset`, holds the budget against another U-Net of the layout than the teacher's,
    say one of full size; nothing is measured then. Raises `ValueError` where no plan fits.
    """
    if not halving_rounds or min(min(one) for one in halving_rounds) < 1:
        raise ValueError(
            f"every halving round needs a plan and a step at least, not {halving_rounds}"
        )
    measure = costs is None and budget.latency is not None
    if costs is None:
        seconds = block_seconds(teacher.unet, **inputs) if measure else None
        costs = cost_every_subset(teacher.unet, seconds, **inputs)
    full_plans(costs, budget)  # a budget too small fails before work
    if judge is None:
        captions = [data.captions[i] for i in data.caption_index[:32].tolist()]
        judge = drawing_judge(teacher, captions, seed=seed)
    settings: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    if scores is None:
        scores = recovered_importance(teacher, data, judge, **settings)
    entrants = rank_plans(scores, costs, budget).head(halving_rounds[0][0])
    if measure:
        entrants = _measured(teacher.unet, entrants, budget, **inputs)
    table = entrants.assign(plan=[plan_without(subset) for subset in entrants.index])
    table = table.reset_index(drop=True)
    for plans, steps in halving_rounds:
        table = table.head(plans).copy()
        for row, plan in table["plan"].items():
            student = slim(teacher.unet, plan)
            table.loc[row, "after_cut"] = judge(student)
            distill(student, teacher, data, steps=steps, **settings, label=plan.name)
            table.loc[row, "recovered"] = judge(student)
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
