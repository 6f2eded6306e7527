"""The stages of chapter 01's study: each writes one file of `results/`, and reads earlier ones."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import torch
from diffusers import UNet2DConditionModel

from kdc import pipelines
from kdc.unet.blocks import PARTS
from kdc.unet.budget import Budget, block_seconds, cost_every_subset
from kdc.unet.layouts import sd_unet
from kdc.unet.plans import SlimPlan
from studies.common import ledger
from studies.common.protocol import Setup, prepare, score
from studies.common.runner import Context, Stage
from studies.slimming import full_size, study

# What the search for time asks of Stable Diffusion's U-Net: at most the parameters of the `kdc`
# plan, and a predicted latency that leaves some room below the 0.45 that is to be measured.
FAST = Budget(parameters=482_346_884, latency=0.43)


def _blocks(context: Context) -> list[Path]:
    seconds = block_seconds(_at_full_size(context.device))
    values = {"whole": seconds[False].to_dict(), "without stage 3": seconds[True].to_dict()}
    return [ledger.write("sd_blocks" + _suffix(context.device), values, context.results)]


def _at_full_size(device: str) -> UNet2DConditionModel:
    return sd_unet(device, torch.float32 if device == "cpu" else torch.bfloat16)


def _suffix(device: str) -> str:
    return "" if device == "cpu" else "_" + device.partition(":")[0]


def full_size_costs(results: Path | None = None) -> pd.DataFrame:
    """`cost_every_subset` of Stable Diffusion's U-Net, with the block times that were stored."""
    stored = ledger.read("sd_blocks", results)
    seconds = {
        False: pd.Series(stored["whole"]),
        True: pd.Series(stored["without stage 3"]),
    }
    return cost_every_subset(sd_unet("meta"), seconds)


def _importance(context: Context) -> list[Path]:
    settings = study.Settings(**context.settings)
    setup = prepare(pipelines.load_teacher("mini"), settings)
    values = {}
    for name, how in study.CRITERIA.items():
        if how.recovery:
            values[name] = study.importance_after_recovery(setup, settings, how).to_dict()
            continue
        rows = study.importance(setup, settings, how.guidance)
        values[name] = {
            part: {str(t): list(e["error"]) for t, e in of_part.groupby("timestep")}
            for part, of_part in rows.groupby("part", sort=False)
        }
    return [ledger.write("importance", values, context.results, **vars(settings))]


def stored_importance(criterion: str = "guided", results: Path | None = None) -> pd.DataFrame:
    """What the stage `importance` measured without recovery, as `sensitivity` gives it."""
    rows = [
        {"part": part, "timestep": int(timestep), "draw": draw, "error": error}
        for part, by_time in ledger.read("importance", results)[criterion].items()
        for timestep, errors in by_time.items()
        for draw, error in enumerate(errors)
    ]
    return pd.DataFrame(rows)


def scores_of(rows: pd.DataFrame) -> pd.Series:
    """Mean error of every part over timesteps and draws, in the order of `PARTS`."""
    return rows.groupby("part")["error"].mean().reindex(PARTS)


def stored_scores(criterion: str = "found", results: Path | None = None) -> pd.Series:
    """The importance of every part by a criterion, in the order of `PARTS`."""
    if study.CRITERIA[criterion].recovery:
        return pd.Series(ledger.read("importance", results)[criterion]).reindex(PARTS)
    return scores_of(stored_importance(criterion, results))


def _search(context: Context) -> list[Path]:
    settings, results = study.Settings(**context.settings), context.results
    setup = prepare(pipelines.load_teacher("mini"), settings)
    scores = {name: stored_scores(name, results) for name in study.CRITERIA}
    budgets = study.budgets_of(setup) | {"time": FAST}
    costs = {"time": full_size_costs(results)}
    values = study.find_plans(setup, scores, budgets, settings, context.folder, costs)
    return [ledger.write("found_plans", values, results, **vars(settings))]


def found_plans(results: Path | None = None) -> dict[str, SlimPlan]:
    """The plans that the stage `search` found."""
    stored = ledger.read("found_plans", results)
    return {name: SlimPlan.from_dict(entry["plan"]) for name, entry in stored.items()}


def _plans(results: Path | None) -> dict[str, SlimPlan]:
    """The named plans and those that the first and the last search found."""
    found = {n: p for n, p in found_plans(results).items() if not n.startswith("guided")}
    return study.named_plans() | found


def _candidates(setup: Setup, results: Path | None, settings: study.Settings) -> dict:
    """For every candidate its plan by seed.

    The later searches were thought of when the first had been seen to fail with `seeds`. So what
    the last one found is measured with fresh ones, and `kdc` beside it with both; what the one
    between found is not measured.
    """
    both = (*settings.seeds, *settings.fresh_seeds)
    seeds = {"kdc": both} | {
        name: settings.fresh_seeds for name in found_plans(results) if name.startswith("found")
    }
    plans = _plans(results)
    of_seeds = {
        name: dict.fromkeys(seeds.get(name, settings.seeds), plan) for name, plan in plans.items()
    }
    return of_seeds | study.random_control(setup, study.budgets_of(setup), settings.seeds)


def _latency(context: Context) -> list[Path]:
    settings, results = study.Settings(**context.settings), context.results
    device = context.device
    setup = prepare(pipelines.load_teacher("mini", device=device), settings)
    plans = _plans(results)  # random ones would fill the memory
    mini = dict(plans)
    for name, by_seed in _candidates(setup, results, settings).items():
        if name not in plans:
            mini |= {of_seed(name, seed): plan for seed, plan in by_seed.items()}
    tables = {
        "full size": full_size.time_plans(_at_full_size(device), plans),
        "mini": full_size.time_plans(setup.teacher.unet, mini, batch_size=16, **setup.inputs),
    }
    values = {
        which: json.loads(table.to_json(orient="index", double_precision=15))
        for which, table in tables.items()
    }
    return [ledger.write("latency" + _suffix(device), values, results)]


def of_seed(candidate: str, seed: int) -> str:
    """The name under which a candidate's plan for that seed was timed."""
    return f"{candidate}, seed {seed}"


def _recovery(context: Context) -> list[Path]:
    settings, results = study.Settings(**context.settings), context.results
    setup = prepare(pipelines.load_teacher("mini"), settings)
    candidates = _candidates(setup, results, settings)
    rows = study.recover(setup, candidates, settings, context.folder)
    generated = [{"seed": seed} | score(setup, setup.teacher, seed) for seed in settings.seeds]
    values = {"rows": rows.to_dict("records"), "teacher": generated}
    return [ledger.write("recovery", values, results, **vars(settings))]


def stored_recovery(results: Path | None = None) -> pd.DataFrame:
    """The rows of the stage `recovery`, each cost also as a share of the teacher's.

    `parameter_ratio` and `mac_ratio` are counted, `latency_ratio` is the mini's, measured.
    """
    rows = pd.DataFrame(ledger.read("recovery", results)["rows"])
    timed = pd.DataFrame(ledger.read("latency", results)["mini"]).T
    names = [
        candidate if candidate in timed.index else of_seed(candidate, seed)
        for candidate, seed in zip(rows["candidate"], rows["seed"], strict=True)
    ]
    ratios = timed.loc[names, ["parameter_ratio", "mac_ratio", "ratio"]].astype(float)
    return rows.join(ratios.rename(columns={"ratio": "latency_ratio"}).reset_index(drop=True))


STAGES = {
    "blocks": Stage(
        _blocks,
        "seconds of every block of Stable Diffusion's U-Net at full size, random weights",
        ("sd_blocks.json",),
    ),
    "importance": Stage(
        _importance,
        "importance of every part of the mini teacher, by timestep and after recovery",
        ("importance.json",),
    ),
    "search": Stage(
        _search,
        "the plans found for the budgets of the kdc plan, and for time at full size",
        ("found_plans.json",),
    ),
    "latency": Stage(
        _latency,
        "parameters, multiply-accumulates and latency of all plans at full size",
        ("latency.json",),
    ),
    "recovery": Stage(
        _recovery,
        "every plan after equal recovery on the mini teacher, over seeds",
        ("recovery.json",),
    ),
}
