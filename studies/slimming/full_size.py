"""Plans of a U-Net timed side by side, also at full size: students borrow the teacher's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
import torch
from diffusers import UNet2DConditionModel

from kdc.unet.costs import call_of, count_costs, measure_latency
from kdc.unet.plans import SlimPlan
from kdc.unet.slimming import copy_map, student_config


def time_plans(
    unet: UNet2DConditionModel,
    plans: Mapping[str, SlimPlan],
    rounds: int = 5,
    prepare: Callable[[UNet2DConditionModel], object] | None = None,
    **inputs,
) -> pd.DataFrame:
    """Costs and latency of the students that the plans cut from `unet`, the teacher in row "full".

    `parameters` and `macs`, the same over the teacher's (`parameter_ratio`, `mac_ratio`), and the
    columns of `measure_latency`, all candidates interleaved. `inputs` are `size`,
    `sequence_length` and `batch_size` as in `count_costs`. Students borrow the teacher's tensors,
    so all fit into the memory of one. `prepare` is called with each network first, to compile it.
    """
    unets = {name: borrow(unet, plan) for name, plan in ({"full": "full"} | dict(plans)).items()}
    totals = {name: count_costs(one, **inputs).loc["total"] for name, one in unets.items()}
    costs = pd.DataFrame(totals).T[["parameters", "macs"]]
    shares = (costs / costs.loc["full"]).set_axis(["parameter_ratio", "mac_ratio"], axis=1)
    for one in unets.values() if prepare else ():
        prepare(one)
    calls = {name: call_of(one, **inputs) for name, one in unets.items()}
    times = measure_latency(calls, rounds=rounds, warmup=1, device=unet.device)
    return costs.join(shares).join(times)


def borrow(unet: UNet2DConditionModel, plan: str | SlimPlan) -> UNet2DConditionModel:
    """`slim` with the teacher's own tensors instead of copies: to be called, not to be trained."""
    theirs = dict(unet.named_parameters())
    sources = copy_map(unet, plan)
    with torch.device("meta"):
        student = UNet2DConditionModel.from_config(student_config(unet, plan))
    borrowed = {name: theirs[source] for name, source in sources.items()}
    student.load_state_dict(borrowed, assign=True)
    return student.eval()
