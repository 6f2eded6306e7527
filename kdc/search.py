"""What each part of a U-Net is worth, and the best plan that a budget allows.

The parts are those that diffusers can leave out one by one: the second layer of a stage (with the
middle one on its way up), the transformer blocks of a stage on either way, the mid-block, and the
innermost stage. There are twelve of them, so the knapsack is solved by trying every subset.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tqdm.auto import tqdm

from kdc.costs import block_of, call_of, count_costs, measure_latency
from kdc.data import LatentDataset
from kdc.distillation import distill, output_error
from kdc.slimming import LAYERS, STAGES, SlimPlan, slim

INNERMOST = f"stage {STAGES - 1}"
PARTS = (
    *(f"layer {stage}" for stage in range(STAGES)),
    *(f"down attention {stage}" for stage in range(STAGES - 1)),
    *(f"up attention {stage}" for stage in range(STAGES - 1)),
    "mid-block",
    INNERMOST,
)


def plan_without(parts: Iterable[str], name: str | None = None) -> SlimPlan:
    """The plan that leaves out those parts; stages are counted from the outermost, on both ways.

    Raises `ValueError` for a part that is not one of `PARTS`.
    """
    removed = set(parts)
    if unknown := removed - set(PARTS):
        raise ValueError(f"unknown parts {sorted(unknown)}; the parts are {', '.join(PARTS)}")
    stages = STAGES - (INNERMOST in removed)
    single = [f"layer {stage}" in removed for stage in range(STAGES)]
    down = [(0,) if single[s] else (0, 1) for s in range(stages)] + [()] * (STAGES - stages)
    up = [(0, LAYERS) if single[s] else (0, 1, LAYERS) for s in range(stages)]
    up = [()] * (STAGES - stages) + up[::-1]
    attends = {
        way: [f"{way} attention {s}" not in removed for s in range(STAGES - 1)] + [False]
        for way in ("down", "up")
    }
    return SlimPlan(
        name or ("without " + ", ".join(sorted(removed)) if removed else "full"),
        tuple(down),
        tuple(up),
        "mid-block" not in removed,
        tuple(attends["down"]),
        tuple(attends["up"][::-1]),
    )


def every_subset() -> list[tuple[str, ...]]:
    """Every choice of parts to leave out, each plan once (a dropped stage has no layers)."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(PARTS, count) for count in range(len(PARTS) + 1)
    )
    return [s for s in subsets if not {INNERMOST, f"layer {STAGES - 1}"} <= set(s)]


def kept_blocks(plan: SlimPlan) -> list[str]:
    """The blocks of the teacher that stay, by the names of `count_costs`."""
    kept = ["conv_in", "time_embedding", "conv_norm_out", "conv_out", "other"]
    stages = STAGES - plan.dropped
    ways = (("down", plan.down, plan.down_attention), ("up", plan.up, plan.up_attention))
    for way, layers, attention in ways:
        for stage in range(STAGES):
            block = f"{way}_blocks.{stage}"
            kept += [f"{block}.resnets.{i}" for i in layers[stage]]
            kept += [f"{block}.attentions.{i}" for i in layers[stage] if attention[stage]]
    kept += [f"down_blocks.{stage}.downsamplers.0" for stage in range(stages - 1)]
    kept += [f"up_blocks.{stage}.upsamplers.0" for stage in range(plan.dropped, STAGES - 1)]
    if plan.mid:
        kept += ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    return kept


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


def time_blocks(unet: UNet2DConditionModel, rounds: int = 8, **inputs) -> pd.Series:
    """Median seconds of each block in a call of `unet`; "other" is the rest of the call."""
    blocks = {block_of(name) for name, _ in unet.named_parameters()}
    names = {module: name for name, module in unet.named_modules() if name in blocks}
    begun: dict[str, float] = {}
    rows: list[dict[str, float]] = []
    on_gpu = unet.device.type == "cuda"

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize(unet.device)
        return time.perf_counter()

    def enter(module, *_):
        begun[names[module]] = now()

    def leave(module, *_):
        name = names[module]
        rows[-1][name] = rows[-1].get(name, 0.0) + now() - begun[name]

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    call = call_of(unet, **inputs)
    try:
        for _ in range(rounds + 1):
            rows.append({})
            start = now()
            call()
            total = now() - start
            rows[-1]["other"] = total - sum(rows[-1].values())
    finally:
        for handle in handles:
            handle.remove()
    return pd.DataFrame(rows[1:]).fillna(0.0).median()


def cost_every_subset(unet: UNet2DConditionModel, *, timed: bool = False, **inputs) -> pd.DataFrame:
    """`parameters`, `macs` and, if `timed`, `latency` (a share of the teacher's) of every subset.

    Rows are the subsets of `every_subset`, as tuples. A block costs the same in every plan, but for
    the mid-block, which works at twice the resolution where the innermost stage is dropped; so the
    costs of blocks are counted on both. `inputs` are `size`, `words` and `batch_size` as in
    `count_costs`. Predicted latency leaves out how blocks affect one another: measure the winner.
    """
    tables = {}
    for dropped, parts in enumerate(((), (INNERMOST,))):
        student = slim(unet, plan_without(parts)) if timed else _on_meta(unet, parts)
        table = count_costs(student, **inputs).drop("total")[["parameters", "macs"]]
        if timed:
            table["latency"] = time_blocks(student, **inputs)
        tables[dropped] = table.fillna(0.0).rename(lambda name, d=dropped: _of_teacher(name, d))
    whole = tables[0].sum()
    rows = {}
    for subset in every_subset():
        plan = plan_without(subset)
        rows[subset] = tables[plan.dropped].reindex(kept_blocks(plan)).sum()
    costs = pd.DataFrame(list(rows.values()))
    costs.index = pd.Index(list(rows), tupleize_cols=False)
    if timed:
        costs["latency"] /= whole["latency"]
    return costs


def sensitivity(
    teacher: StableDiffusionPipeline,
    data: LatentDataset,
    *,
    draws: int = 4,
    count: int = 16,
    levels: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Output error of the teacher with one part left out: `part`, `timestep`, `draw`, `error`.

    Every draw has pictures, captions and noise of its own, the same for all parts; the spread over
    draws is that of the estimate.
    """
    rows = []
    for part in tqdm(PARTS, desc="sensitivity", mininterval=2):
        student = slim(teacher.unet, plan_without([part]))
        for draw in range(draws):
            errors = output_error(
                student, teacher, data, count=count, levels=levels, seed=seed * 1000 + draw
            )
            rows += [
                {"part": part, "timestep": t, "draw": draw, "error": e} for t, e in errors.items()
            ]
    return pd.DataFrame(rows)


def rank_plans(scores: pd.Series, costs: pd.DataFrame, budget: Budget) -> pd.DataFrame:
    """All subsets within the budget, the least sum of scores first: the knapsack, solved exactly.

    `scores` gives each part of `PARTS` its sensitivity. Raises `ValueError` where no plan fits.
    """
    fitting = costs[budget.allows(costs)].copy()
    if fitting.empty:
        least = ", ".join(f"{name} {costs[name].min():,.3g}" for name in costs)
        raise ValueError(f"no plan fits {budget}; the least that plans can cost is {least}")
    fitting["score"] = [sum(scores[part] for part in subset) for subset in fitting.index]
    return fitting.sort_values("score", kind="stable")


def search_plan(
    teacher: StableDiffusionPipeline,
    data: LatentDataset,
    budget: Budget,
    *,
    scores: pd.Series | None = None,
    test_data: LatentDataset | None = None,
    keep: int = 4,
    steps: int = 60,
    batch_size: int = 16,
    count: int = 48,
    seed: int = 0,
    **inputs,
) -> tuple[SlimPlan, pd.DataFrame]:
    """The best plan within the budget, and the table of the finalists.

    Parts are scored by `sensitivity` (unless `scores` are given), the knapsack is solved exactly,
    and the `keep` best plans are judged by a recovery of `steps` distillation steps each, because
    the lowest error right after the cut does not decide (Fang et al., arXiv 2412.01199). The table,
    best first, has for each finalist its costs, `score`, and `output_error` after the cut and after
    recovery, on `count` pictures of `test_data` (default: `data`). With a latency budget the
    finalists are measured as well, and those above it fall out. Raises `ValueError` where no plan
    fits.
    """
    if keep < 1 or steps < 1:
        raise ValueError("keep and steps must be at least 1")
    test_data = data if test_data is None else test_data
    costs = cost_every_subset(teacher.unet, timed=budget.latency is not None, **inputs)
    if scores is None:
        rank_plans(pd.Series(0.0, PARTS), costs, budget)  # a budget too small fails before work
        scores = sensitivity(teacher, data, seed=seed).groupby("part")["error"].mean()
    finalists = rank_plans(scores, costs, budget).head(keep)
    if budget.latency is not None:
        finalists = _measured(teacher.unet, finalists, budget, **inputs)
    rows = []
    for subset, row in finalists.iterrows():
        plan = plan_without(subset)
        student = slim(teacher.unet, plan)
        cut = output_error(student, teacher, test_data, count=count).mean()
        distill(
            student, teacher, data, steps=steps, batch_size=batch_size, seed=seed, label=plan.name
        )
        recovered = output_error(student, teacher, test_data, count=count).mean()
        rows.append({"plan": plan, **row, "after_cut": cut, "recovered": recovered})
    table = pd.DataFrame(rows).sort_values("recovered", ignore_index=True)
    return table.loc[0, "plan"], table


def _measured(unet, finalists: pd.DataFrame, budget: Budget, **inputs) -> pd.DataFrame:
    """The finalists with their measured latency; those over the budget left out."""
    calls = {"teacher": call_of(unet, **inputs)}
    calls |= {s: call_of(slim(unet, plan_without(s)), **inputs) for s in finalists.index}
    ratios = measure_latency(calls, device=unet.device)["ratio"].iloc[1:]
    measured = finalists.assign(latency=ratios.to_numpy())
    if not (fits := budget.allows(measured)).any():
        raise ValueError(
            f"predicted to fit {budget}, the finalists were measured at latencies "
            f"{', '.join(f'{ratio:.3f}' for ratio in ratios)}: raise `keep` or the budget"
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
