"""The parts of a U-Net that can be left out one by one, and the plans that leave some of them out.

They are what diffusers can hold without: the second layer of a stage (with the middle one on its
way up), the transformer blocks of a stage on either way, the mid-block, and the innermost stage.
Stages are counted from the outermost.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from kdc.unet.plans import LAYERS, STAGES, SlimPlan

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
    inner_up: list[tuple[int, ...]] = [()] * (STAGES - stages)
    up = [(0, LAYERS) if single[s] else (0, 1, LAYERS) for s in range(stages)]
    attends = {
        way: [f"{way} attention {s}" not in removed for s in range(STAGES - 1)] + [False]
        for way in ("down", "up")
    }
    return SlimPlan(
        name or ("without " + ", ".join(sorted(removed)) if removed else "full"),
        tuple(down),
        (*inner_up, *up[::-1]),
        "mid-block" not in removed,
        tuple(attends["down"]),
        tuple(attends["up"][::-1]),
    )


def subset_of(parts: Iterable[str]) -> tuple[str, ...]:
    """The entry of `every_subset` that leaves out those parts: in order, each plan once."""
    removed = set(parts)
    if INNERMOST in removed:
        removed.discard(f"layer {STAGES - 1}")
    return tuple(part for part in PARTS if part in removed)


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


def group_of(block: str) -> str:
    """Stage and kind of one of the teacher's blocks: "stage 0, transformers", "mid-block", ..."""
    parts = block.split(".")
    if parts[0] == "mid_block":
        return "mid-block"
    if len(parts) < 3:
        return "the rest"
    stage = int(parts[1]) if parts[0] == "down_blocks" else STAGES - 1 - int(parts[1])
    return f"stage {stage}, {'transformers' if parts[2] == 'attentions' else 'convolutions'}"
