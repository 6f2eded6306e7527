"""Which plan is best after equal recovery: found, named and random ones, paired over seeds.

Plans are found with training images and seeds of their own (`SEARCH_SEED`); what is reported is
measured on test images and with other seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from diffusers import UNet2DConditionModel

from kdc import pipelines
from kdc.distillation.distill import distill
from kdc.distillation.fidelity import drawing_judge, output_error
from kdc.io import fingerprint, make_once
from kdc.search import Judge, recovered_importance, search_plan, sensitivity
from kdc.unet.blocks import plan_without
from kdc.unet.budget import Budget, cost_every_subset, random_plans
from kdc.unet.costs import count_costs
from kdc.unet.plans import PLANS, SlimPlan, find_plan
from kdc.unet.slimming import slim
from studies.common.protocol import Extent, Setup, score, slug

SEARCH_SEED = 1000
OF_A_ROW = ("steps", "batch_size", "images", "test_images", "copies", "sampling_steps")


@dataclass(frozen=True)
class Settings(Extent):
    """How much is measured. The defaults are those of the budget `standard`."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    fresh_seeds: tuple[int, ...] = (5, 6, 7)  # for what was found after `seeds` were seen
    steps: int = 200  # of recovery, the same for every plan
    batch_size: int = 16
    draws: int = 6  # of the estimate of sensitivity, each on `count` images
    count: int = 32


@dataclass(frozen=True)
class Criterion:
    """How a search tells good plans from bad ones.

    Students are judged by their `output_error` at `guidance`, or, where that is None, by their
    drawings. Parts are scored by what bypassing them does to the judge, with `recovery` steps of
    distillation in between; `halving_rounds` are those of `search_plan`. `budgets` names the
    budgets that the criterion is used for.
    """

    guidance: float | None
    recovery: int
    halving_rounds: tuple[tuple[int, int], ...]
    budgets: tuple[str, ...] = ("parameters", "macs", "time")


# In the order in which they were tried: chapter 01 tells why the first two failed. The first did
# not fail for the parameters, so the second left that budget out.
CRITERIA = {
    "unguided": Criterion(1.0, 0, ((4, 60),)),
    "guided": Criterion(7.5, 0, ((12, 30), (4, 90)), ("macs", "time")),
    "found": Criterion(None, 40, ((6, 60), (3, 120))),
}


def judge_of(setup: Setup, criterion: Criterion, settings: Settings) -> Judge:
    """The judge of a search, on training images and with a seed of its own."""
    if criterion.guidance is None:
        train = setup.train
        captions = [train.captions[i] for i in train.caption_index[: settings.count].tolist()]
        return drawing_judge(
            setup.teacher, captions, steps=settings.sampling_steps, seed=SEARCH_SEED
        )

    def judge(student: UNet2DConditionModel) -> float:
        how = {"count": settings.count, "guidance": criterion.guidance}
        return output_error(student, setup.teacher, setup.train, **how).mean()

    return judge


def importance(setup: Setup, settings: Settings, guidance: float) -> pd.DataFrame:
    """`sensitivity` of every part on training images."""
    return sensitivity(
        setup.teacher,
        setup.train,
        draws=settings.draws,
        count=settings.count,
        guidance=guidance,
        seed=SEARCH_SEED,
    )


def importance_after_recovery(setup: Setup, settings: Settings, criterion: Criterion) -> pd.Series:
    """`recovered_importance` of every part by a criterion's own judge."""
    return recovered_importance(
        setup.teacher,
        setup.train,
        judge_of(setup, criterion, settings),
        steps=criterion.recovery,
        batch_size=settings.batch_size,
        seed=SEARCH_SEED,
    )


def budgets_of(setup: Setup, plan: str | SlimPlan = "kdc") -> dict[str, Budget]:
    """The plan's own costs as two budgets: its parameters, and its multiply-accumulates."""
    total = count_costs(slim(setup.teacher.unet, plan), **setup.inputs).loc["total"]
    return {
        "parameters": Budget(parameters=int(total["parameters"])),
        "macs": Budget(macs=int(total["macs"])),
    }


def find_plans(
    setup: Setup,
    scores: Mapping[str, pd.Series],
    budgets: Mapping[str, Budget],
    settings: Settings,
    folder: str | Path,
    costs: Mapping[str, pd.DataFrame] | None = None,
) -> dict[str, dict]:
    """What `search_plan` finds by every criterion of `scores` for every budget.

    `scores` holds for each name of `CRITERIA` what the parts are importance by it, `costs` gives a
    budget the table it is held against, where that is not the teacher's own. The values are
    {"plan", "finalists"}, in JSON's types; each is stored in `folder` as soon as it is there.
    """
    own = cost_every_subset(setup.teacher.unet, **setup.inputs)
    found = {}
    for (criterion, parts), (budget, limit) in itertools.product(scores.items(), budgets.items()):
        name, how = f"{criterion}: {budget}", CRITERIA[criterion]
        if budget not in how.budgets:
            continue

        def search(name=name, how=how, parts=parts, budget=budget, limit=limit) -> dict:
            plan, table = search_plan(
                setup.teacher,
                setup.train,
                limit,
                scores=parts,
                costs=(costs or {}).get(budget, own),
                judge=judge_of(setup, how, settings),
                halving_rounds=how.halving_rounds,
                batch_size=settings.batch_size,
                seed=SEARCH_SEED,
            )
            table = table.assign(plan=[str(one) for one in table["plan"]])
            plan = dataclasses.replace(plan, name=name)
            return {"plan": plan.to_dict(), "finalists": table.to_dict("records")}

        judged = {
            "guidance": how.guidance,
            "recovery": how.recovery,
            "halving_rounds": how.halving_rounds,
        }
        made_with = {"criterion": judged, "scores": parts.to_dict()}
        made_with |= {"budget": dataclasses.asdict(limit), "count": settings.count}
        found[name] = make_once(Path(folder) / f"{slug(name)}.json", made_with, search)
    return found


def random_control(
    setup: Setup, budgets: Mapping[str, Budget], seeds: tuple[int, ...]
) -> dict[str, dict[int, SlimPlan]]:
    """For every budget a random plan a seed, all of them different (see `random_plans`)."""
    costs = cost_every_subset(setup.teacher.unet, **setup.inputs)
    control = {}
    for name, budget in budgets.items():
        generator = torch.Generator().manual_seed(SEARCH_SEED)
        generated = random_plans(costs, budget, max(seeds) + 1, generator)
        control[f"random: {name}"] = {seed: plan_without(generated[seed]) for seed in seeds}
    return control


def judge(setup: Setup, plan: SlimPlan, seed: int, settings: Settings) -> dict:
    """Cut, recover and measure one plan with one seed: a row of the study.

    `after_cut` and `output_error` are E |s - u|^2 on test images before and after recovery; the
    other columns are those of `setup.score`.
    """
    unet = slim(setup.teacher.unet, plan)
    costs = count_costs(unet, **setup.inputs).loc["total"]
    row = {"seed": seed, "plan": plan.to_dict(), "steps": settings.steps}
    row |= {name: int(costs[name]) for name in ("parameters", "macs")}
    row["after_cut"] = output_error(unet, setup.teacher, setup.test).mean()
    distill(
        unet,
        setup.teacher,
        setup.train,
        steps=settings.steps,
        batch_size=settings.batch_size,
        seed=seed,
        label=plan.name,
    )
    row["output_error"] = output_error(unet, setup.teacher, setup.test).mean()
    return row | score(setup, pipelines.with_unet(setup.teacher, unet), seed)


def recover(
    setup: Setup,
    candidates: Mapping[str, Mapping[int, SlimPlan]],
    settings: Settings,
    folder: str | Path,
) -> pd.DataFrame:
    """`judge` every candidate's plan of each of its seeds.

    Every row is stored in `folder` as soon as it is there and read back by a later call, so a study
    that was stopped goes on. Raises `ValueError` where `folder` holds rows of other settings.
    """
    fixed = {name: getattr(settings, name) for name in OF_A_ROW}
    fixed["teacher"] = fingerprint(*setup.teacher.unet.state_dict().values())
    rows = []
    for seed in (*settings.seeds, *settings.fresh_seeds):
        for name, plans in candidates.items():
            if seed not in plans:
                continue
            made_with = fixed | {"plan": plans[seed].to_dict(), "seed": seed}
            row = functools.partial(judge, setup, plans[seed], seed, settings)
            file = Path(folder) / f"{slug(name)}-{seed}.json"
            rows.append({"candidate": name} | make_once(file, made_with, row))
    return pd.DataFrame(rows)


def named_plans() -> dict[str, SlimPlan]:
    """The published plans, without the one that removes nothing."""
    return {name: find_plan(name) for name in PLANS if name != "full"}
