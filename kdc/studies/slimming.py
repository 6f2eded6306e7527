"""Which plan is best after equal recovery: found, named and random ones, paired over seeds.

Plans are found with training pictures and seeds of their own (`SEARCH_SEED`); what is reported is
measured on test pictures and with other seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from scipy import stats

from kdc import metrics, models, worlds
from kdc.costs import count_costs
from kdc.data import LatentDataset, cache_latents, load_dataset
from kdc.distillation import distill, fingerprint, output_error
from kdc.mini.grades import balanced_prompts, renderings_of
from kdc.parts import plan_without
from kdc.search import Budget, cost_every_subset, random_plans, search_plan, sensitivity
from kdc.slimming import PLANS, SlimPlan, find_plan, slim

SEARCH_SEED = 1000
OF_A_ROW = ("steps", "batch_size", "pictures", "test_pictures", "copies", "sampling_steps")
MEASURES = {"output_error": "lower", "accuracy": "higher", "frechet": "lower"}


@dataclass(frozen=True)
class Settings:
    """How much is measured. The defaults are those of the budget `standard`."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    fresh_seeds: tuple[int, ...] = (5, 6, 7, 8, 9)  # for what was found after `seeds` were seen
    steps: int = 200  # of recovery, the same for every plan
    batch_size: int = 16
    pictures: int = 1600  # to train on
    test_pictures: int = 192
    copies: int = 1  # of each combination of attributes, drawn to be judged
    sampling_steps: int = 10
    draws: int = 6  # of the estimate of sensitivity, each on `count` pictures
    count: int = 32


@dataclass(frozen=True)
class Criterion:
    """How a search tells good plans from bad ones; see `search_plan`."""

    guidance: float
    heats: tuple[tuple[int, int], ...]


# The first search failed: see chapter 01. The second judges at the sampler's guidance, more plans.
CRITERIA = {
    "unguided": Criterion(1.0, ((4, 60),)),
    "found": Criterion(7.5, ((12, 30), (4, 90))),
}


@dataclass
class Bench:
    """What every plan is trained on and measured with: the same for all of them."""

    teacher: StableDiffusionPipeline
    train: LatentDataset
    test: LatentDataset
    asked: list[worlds.Attributes]  # empty where the data set's attributes are unknown
    reference: torch.Tensor | None  # features of real renderings of what is asked

    @property
    def inputs(self) -> dict[str, int]:
        """Size of latents and length of captions, as `count_costs` takes them."""
        return {"size": self.train.mean.shape[-1], "words": self.train.embeddings.shape[1]}


def prepare(
    teacher: StableDiffusionPipeline, settings: Settings, dataset: str | Path = "worlds"
) -> Bench:
    """Encode the pictures. Only "worlds" has attributes to be judged by; else they are left out."""
    size = teacher.unet.config.sample_size * teacher.vae_scale_factor
    train, test = (
        cache_latents(teacher, load_dataset(dataset, split, size, count=count))
        for split, count in (("train", settings.pictures), ("test", settings.test_pictures))
    )
    asked = balanced_prompts(settings.copies, held_out=False) if dataset == "worlds" else []
    reference = metrics.clip_features(renderings_of(asked, seed=3)) if asked else None
    return Bench(teacher, train, test, asked, reference)


def worth(bench: Bench, settings: Settings, guidance: float) -> pd.DataFrame:
    """`sensitivity` of every part on training pictures."""
    return sensitivity(
        bench.teacher,
        bench.train,
        draws=settings.draws,
        count=settings.count,
        guidance=guidance,
        seed=SEARCH_SEED,
    )


def budgets_of(bench: Bench, plan: str | SlimPlan = "kdc") -> dict[str, Budget]:
    """The plan's own costs as two budgets: its parameters, and its multiply-accumulates."""
    total = count_costs(slim(bench.teacher.unet, plan), **bench.inputs).loc["total"]
    return {
        "parameters": Budget(parameters=int(total["parameters"])),
        "macs": Budget(macs=int(total["macs"])),
    }


def find_plans(
    bench: Bench,
    scores: Mapping[str, pd.Series],
    budgets: Mapping[str, Budget],
    settings: Settings,
    folder: str | Path,
    costs: Mapping[str, pd.DataFrame] | None = None,
) -> dict[str, dict]:
    """What `search_plan` finds by every criterion of `scores` for every budget.

    `scores` holds for each name of `CRITERIA` the sensitivities measured at its guidance, `costs`
    gives a budget the table it is held against, where that is not the teacher's own. The values
    are {"plan", "finalists"}, in JSON's types; each is kept in `folder` as soon as it is there.
    """
    own = cost_every_subset(bench.teacher.unet, **bench.inputs)
    found = {}
    for (criterion, parts), (budget, limit) in itertools.product(scores.items(), budgets.items()):
        name = f"{criterion}: {budget}"
        how = dataclasses.asdict(CRITERIA[criterion]) | {
            "batch_size": settings.batch_size,
            "count": settings.count,
            "seed": SEARCH_SEED,
        }

        def search(name=name, parts=parts, budget=budget, limit=limit, how=how) -> dict:
            against = (costs or {}).get(budget, own)
            plan, table = search_plan(
                bench.teacher, bench.train, limit, scores=parts, costs=against, **how
            )
            table = table.assign(plan=[str(one) for one in table["plan"]])
            plan = dataclasses.replace(plan, name=name)
            return {"plan": plan.to_dict(), "finalists": table.to_dict("records")}

        made_with = how | {"scores": parts.to_dict(), "budget": dataclasses.asdict(limit)}
        found[name] = kept(Path(folder) / f"{slug(name)}.json", made_with, search)
    return found


def random_control(
    bench: Bench, budgets: Mapping[str, Budget], seeds: tuple[int, ...]
) -> dict[str, dict[int, SlimPlan]]:
    """For every budget a random plan a seed, all of them different (see `random_plans`)."""
    costs = cost_every_subset(bench.teacher.unet, **bench.inputs)
    control = {}
    for name, budget in budgets.items():
        generator = torch.Generator().manual_seed(SEARCH_SEED)
        drawn = random_plans(costs, budget, max(seeds) + 1, generator)
        control[f"random: {name}"] = {seed: plan_without(drawn[seed]) for seed in seeds}
    return control


def judge(bench: Bench, plan: SlimPlan, seed: int, settings: Settings) -> dict:
    """Cut, recover and measure one plan with one seed: a row of the study.

    `after_cut` and `output_error` are E |s - u|^2 on test pictures before and after recovery. With
    attributes, `accuracy` is the share of drawn pictures that show the asked-for colour, kind and
    background all at once, each of which has a column too, and `frechet` the distance to real
    renderings in the features of the embedded CLIP.
    """
    unet = slim(bench.teacher.unet, plan)
    costs = count_costs(unet, **bench.inputs).loc["total"]
    row = {"seed": seed, "plan": plan.to_dict(), "steps": settings.steps}
    row |= {name: int(costs[name]) for name in ("parameters", "macs")}
    row["after_cut"] = output_error(unet, bench.teacher, bench.test).mean()
    distill(
        unet,
        bench.teacher,
        bench.train,
        steps=settings.steps,
        batch_size=settings.batch_size,
        seed=seed,
        label=plan.name,
    )
    row["output_error"] = output_error(unet, bench.teacher, bench.test).mean()
    return row | score(bench, models.with_unet(bench.teacher, unet), seed, settings)


def score(bench: Bench, pipeline: StableDiffusionPipeline, seed: int, settings: Settings) -> dict:
    """Attribute accuracies and Fréchet distance of what a pipeline draws; empty without them."""
    if not bench.asked:
        return {}
    pictures = models.generate(
        pipeline,
        [worlds.caption(one) for one in bench.asked],
        seed=seed,
        steps=settings.sampling_steps,
    )
    shares = metrics.attribute_accuracy(pictures, bench.asked)
    frechet = metrics.frechet_distance(metrics.clip_features(pictures), bench.reference)
    return {"accuracy": shares.pop("all"), **shares, "frechet": frechet}


def recover(
    bench: Bench,
    candidates: Mapping[str, Mapping[int, SlimPlan]],
    settings: Settings,
    folder: str | Path,
) -> pd.DataFrame:
    """`judge` every candidate's plan of each of its seeds.

    Every row is kept in `folder` as soon as it is there and read back by a later call, so a study
    that was stopped goes on. Raises `ValueError` where `folder` holds rows of other settings.
    """
    fixed = {name: getattr(settings, name) for name in OF_A_ROW}
    fixed["teacher"] = fingerprint(*bench.teacher.unet.state_dict().values())
    rows = []
    for seed in (*settings.seeds, *settings.fresh_seeds):
        for name, plans in candidates.items():
            if seed not in plans:
                continue
            made_with = fixed | {"plan": plans[seed].to_dict(), "seed": seed}
            row = functools.partial(judge, bench, plans[seed], seed, settings)
            file = Path(folder) / f"{slug(name)}-{seed}.json"
            rows.append({"candidate": name} | kept(file, made_with, row))
    return pd.DataFrame(rows)


def kept(file: Path, made_with: dict, make: Callable[[], dict]) -> dict:
    """What `make()` gives, from `file` if it is there already, and there afterwards.

    Raises `ValueError` where `file` was made with other settings.
    """
    made_with = json.loads(json.dumps(made_with))
    if file.is_file():
        stored = json.loads(file.read_text())
        if stored["made_with"] != made_with:
            raise ValueError(f"{file} was made with other settings: use another folder")
        return stored["row"]
    file.parent.mkdir(parents=True, exist_ok=True)
    row = json.loads(json.dumps(make()))
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"made_with": made_with, "row": row}))
    partial.rename(file)
    return row


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", name.lower())


def compare(
    rows: pd.DataFrame, candidate: str, rival: str, confidence: float = 0.95
) -> pd.DataFrame:
    """Differences candidate - rival, paired by seed: `mean`, the ends of Student's interval, `n`.

    `verdict` is "better", "worse" or, where the interval holds 0 or there is one seed, "open".
    """
    table = {}
    for measure, aim in MEASURES.items():
        if measure not in rows:
            continue
        wide = rows.pivot(index="seed", columns="candidate", values=measure)
        difference = (wide[candidate] - wide[rival]).dropna()
        low, high = interval(difference, confidence)
        good = high < 0 if aim == "lower" else low > 0
        bad = low > 0 if aim == "lower" else high < 0
        verdict = "better" if good else "worse" if bad else "open"
        table[measure] = {"mean": difference.mean(), "low": low, "high": high}
        table[measure] |= {"n": len(difference), "verdict": verdict}
    return pd.DataFrame(table).T


def interval(values: pd.Series, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of some values; NaN below two of them."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.sem()
    return values.mean() - half, values.mean() + half


def named_plans() -> dict[str, SlimPlan]:
    """The published plans, without the one that removes nothing."""
    return {name: find_plan(name) for name in PLANS if name != "full"}
