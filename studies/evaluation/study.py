"""The last comparison: teacher and students on every score, their time, and how few steps do.

Which number of steps is the fastest that is good enough is chosen on one seed; what is reported of
it is drawn from others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from diffusers import StableDiffusionPipeline

from kdc.data import worlds
from kdc.evaluation.compare import compare
from kdc.evaluation.evaluate import Scores, evaluate
from kdc.evaluation.extractors import find_extractor
from kdc.evaluation.latency import fastest_within, time_calls, time_images, with_scheduler
from kdc.evaluation.metrics import Evidence, means, score
from kdc.io import fingerprint, make_once
from kdc.pipelines import generate, load_student
from studies.common.protocol import slug
from studies.common.recipes import STUDENT_RECIPE
from studies.common.renderings import balanced_prompts, renderings_of

SHIPPED = "shipped student"
FASTER, LOSS = 5.0, 0.05  # the goals: times as fast, and share of the accuracy that may be lost


@dataclass(frozen=True)
class Settings:
    """How much is measured. The defaults are those of the budget `standard`."""

    recipes: tuple[str, ...] = (STUDENT_RECIPE, "authors' terms, features averaged")
    training_steps: int = 200
    trainings: tuple[int, ...] = (0, 1, 2)  # seeds of students after equal steps
    steps: tuple[int, ...] = (4, 6, 8, 12, 16, 25, 50)
    schedulers: tuple[str, ...] = ("dpm++", "ddim")
    goal_steps: int = 50  # the teacher's, with the first scheduler
    generated: int = 144
    references: int = 288
    choosing: int = 100  # the seed on which steps are chosen
    choosing_generated: int = 72
    seeds: tuple[int, ...] = (0, 1, 2)  # those on which everything is reported
    table_steps: int = 10  # for students after equal steps, and for the teacher beside them
    batch_sizes: tuple[int, ...] = (1, 8)
    rounds: int = 7


def asked_for(count: int) -> list[worlds.Attributes]:
    """`count` combinations that were trained on, evenly spread over both worlds."""
    every = balanced_prompts(1, held_out=False)
    return [every[i * len(every) // count] for i in range(count)]


def pipelines(teacher: StableDiffusionPipeline) -> dict[str, StableDiffusionPipeline]:
    """The two whose time is measured."""
    return {"teacher": teacher, SHIPPED: load_student("mini", teacher)}


def sweep(
    candidates: Mapping[str, StableDiffusionPipeline], settings: Settings, folder: Path
) -> pd.DataFrame:
    """Accuracy and CLIP score by pipeline, scheduler and steps, on the seed for choosing."""
    asked, rows = asked_for(settings.choosing_generated), []
    captions = [worlds.caption(a) for a in asked]
    for name, pipeline in candidates.items():
        print_of = fingerprint(*pipeline.unet.state_dict().values())
        for scheduler in settings.schedulers:
            other = with_scheduler(pipeline, scheduler)
            for steps in settings.steps:

                def make(other=other, steps=steps) -> dict:
                    evidence = Evidence(
                        images=generate(other, captions, seed=settings.choosing, steps=steps),
                        extractor=find_extractor("mini-clip"),
                        prompts=captions,
                        attributes=asked,
                    )
                    return means(score(evidence, ("accuracy", "clip"))[0])

                made_with = {"seed": settings.choosing, "unet": print_of}
                made_with["generated"] = settings.choosing_generated
                file = folder / f"sweep-{slug(name)}-{slug(scheduler)}-{steps}.json"
                row = make_once(file, made_with, make)
                rows.append({"pipeline": name, "scheduler": scheduler, "steps": steps} | row)
    return pd.DataFrame(rows)


def timed(
    candidates: Mapping[str, StableDiffusionPipeline], settings: Settings
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Seconds an image, all settings interleaved; and seconds of a call of each U-Net.

    The time of a step hardly depends on the scheduler, so the first one is timed. `ratio` is over
    the teacher at `goal_steps`.
    """
    steps = (settings.goal_steps, *(s for s in settings.steps if s != settings.goal_steps))
    prompt = worlds.caption(asked_for(1)[0])
    first = {n: with_scheduler(p, settings.schedulers[0]) for n, p in candidates.items()}
    table = time_images(
        first, prompt, steps=steps, batch_sizes=settings.batch_sizes, rounds=settings.rounds
    )
    return table, time_calls(first, settings.batch_sizes, rounds=3 * settings.rounds)


def choose(generated: pd.DataFrame, times: pd.DataFrame, settings: Settings) -> list[dict]:
    """The settings of each pipeline that are reported, by two rules; `rules` names them.

    Good enough is an accuracy within 5 % of the teacher's at `goal_steps`, on the seed for
    choosing. "fastest" is the fastest that is good enough, "best" of those that are also five times
    as fast as that teacher the one with the highest CLIP score. A rule may find nothing.
    """
    one = times[times["batch_size"] == settings.batch_sizes[0]]
    rows = generated.merge(one[["pipeline", "steps", "median", "ratio"]], on=["pipeline", "steps"])
    goal = rows[(rows["pipeline"] == "teacher") & (rows["steps"] == settings.goal_steps)]
    goal = goal[goal["scheduler"] == settings.schedulers[0]]["accuracy"].item()
    found: dict[tuple, dict] = {}
    for _, group in rows.groupby("pipeline", sort=False):
        quick = group[group["ratio"] <= 1 / FASTER]
        good = quick[quick["accuracy"] >= (1 - LOSS) * goal]
        best = good.loc[good["clip"].idxmax()] if len(good) else None
        for rule, row in (("fastest", fastest_within(group, goal, LOSS)), ("best", best)):
            if row is not None:
                key = row["pipeline"], row["scheduler"], row["steps"]
                rules = [*found.get(key, {"rules": []})["rules"], rule]
                found[key] = row.to_dict() | {"rules": rules, "steps": int(row["steps"])}
    return list(found.values())


def label_of(setting: Mapping) -> str:
    """How a chosen setting is called in tables."""
    return f"{setting['pipeline']}, {setting['scheduler']}, {setting['steps']} steps"


def scored(
    pipeline: StableDiffusionPipeline,
    settings: Settings,
    steps: int,
    teacher: Scores | None = None,
) -> Scores:
    """`evaluate` with all metrics, on the seeds that are reported; `teacher` has been scored."""
    asked = asked_for(settings.generated)
    every = balanced_prompts(1, held_out=False)
    reference = renderings_of((every * 2)[: settings.references], seed=5)
    return evaluate(
        pipeline,
        [worlds.caption(a) for a in asked],
        reference,
        attributes=asked,
        teacher=teacher,
        seeds=settings.seeds,
        steps=steps,
    )


def report(
    candidates: Mapping[str, StableDiffusionPipeline],
    generated: pd.DataFrame,
    times: pd.DataFrame,
    settings: Settings,
) -> dict:
    """What `choose` finds, generated again on the seeds that are reported.

    `tables` are those of `evaluate`, the teacher at `goal_steps` first; `compared` says for each
    chosen setting which scores differ from the teacher's. `candidates` has "teacher" in it.
    """
    teacher, chosen = candidates["teacher"], choose(generated, times, settings)
    first = with_scheduler(teacher, settings.schedulers[0])
    goal = scored(first, settings, settings.goal_steps)
    values = {"sweep": generated.to_dict("records"), "chosen": chosen, "compared": {}}
    values["tables"] = {"teacher": plain(goal.table)}
    itself = {"pipeline": "teacher", "scheduler": settings.schedulers[0]}
    for setting in chosen:
        if itself | {"steps": settings.goal_steps} == {k: setting[k] for k in (*itself, "steps")}:
            continue
        other = with_scheduler(candidates[setting["pipeline"]], setting["scheduler"])
        found = scored(other, settings, setting["steps"])
        values["tables"][label_of(setting)] = plain(found.table)
        compared = compare(found, goal, may_differ=("steps",))
        values["compared"][label_of(setting)] = plain(compared)
    return values


def plain(table: pd.DataFrame) -> dict:
    """A table with its row names, for a ledger; NaN becomes None."""
    return table.astype(object).where(table.notna(), None).to_dict("index")
