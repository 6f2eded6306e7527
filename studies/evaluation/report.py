"""What chapter 06 shows of its study: the headline, the table after equal steps, all plans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from studies.common import ledger
from studies.common.protocol import MEASURES
from studies.evaluation.study import FASTER, LOSS, SHIPPED, label_of
from studies.slimming.report import stored

SHOWN = ("accuracy", "clip", "fd", "kid", "precision", "recall", "lpips_to_teacher", "diversity")


def frontier(steps: Mapping, clock: Mapping) -> pd.DataFrame:
    """The sweep with the seconds an image of each setting, at the first batch size."""
    times = pd.DataFrame(clock["images"])
    times = times[times["batch_size"] == times["batch_size"].iloc[0]]
    columns = ["pipeline", "steps", "median", "ratio"]
    return pd.DataFrame(steps["sweep"]).merge(times[columns], on=["pipeline", "steps"])


def curves_of(sweep: pd.DataFrame, score: str) -> dict[str, tuple[list, list]]:
    """Lines of a score against seconds, by pipeline and scheduler."""
    return {
        f"{name}, {scheduler}": (group["median"].tolist(), group[score].tolist())
        for (name, scheduler), group in sweep.groupby(["pipeline", "scheduler"], sort=False)
    }


def headline_table(steps: Mapping) -> pd.DataFrame:
    """The chosen settings on the seeds that report, the teacher at its many steps first."""
    chosen = {label_of(setting): setting for setting in steps["chosen"]}
    rows = {}
    for label, scores in steps["tables"].items():
        table = pd.DataFrame(scores).T
        row = {"chosen as": "", "times as fast": 1.0}
        if label in chosen:
            row = {"chosen as": " and ".join(chosen[label]["rules"])}
            row["times as fast"] = round(1 / chosen[label]["ratio"], 2)
        for name in SHOWN:
            if name in table.index and pd.notna(table.loc[name, "value"]):
                row[name] = round(table.loc[name, "value"], 3)
        for name in ("accuracy", "clip"):
            if label in steps["compared"]:
                row[f"{name}: verdict"] = steps["compared"][label][name]["verdict"]
        rows[label] = row
    return pd.DataFrame(rows)


def goals(steps: Mapping, rule: str = "best") -> dict[str, tuple[bool, str]]:
    """Whether each part of the claim holds for the shipped student's setting, and in what numbers.

    `rule` is one of `headline.choose`.
    """
    ours = [s for s in steps["chosen"] if s["pipeline"] == SHIPPED and rule in s["rules"]]
    if not ours:
        return {"a setting was found": (False, "none, on the seed that chooses")}
    label, ratio = label_of(ours[0]), 1 / ours[0]["ratio"]
    student, teacher = (steps["tables"][name]["accuracy"]["value"] for name in (label, "teacher"))
    clip = steps["compared"][label]["clip"]
    return {
        f"at least {FASTER:g} times as fast": (ratio >= FASTER, f"{ratio:.1f} times ({label})"),
        f"within {LOSS:.0%} of the accuracy": (
            student / teacher >= 1 - LOSS,
            f"{student / teacher:.1%} of the teacher's, on the seeds that report",
        ),
        "CLIP score not distinguishable": (
            clip["verdict"] == "not distinguishable",
            f"difference {clip['difference']:+.2f}, {_chance(clip['p'])}",
        ),
    }


def equal_steps(table: Mapping) -> pd.DataFrame:
    """Teacher, shipped student and recipes: mean of each score, and where its spread comes from.

    A recipe's text is mean (retraining, sampling); a single network's mean ± sampling.
    """
    columns = {}
    for label in ("teacher", SHIPPED):
        scores = pd.DataFrame(table["tables"][label]).T
        columns[label] = {
            name: f"{scores.loc[name, 'value']:.3g} ± {scores.loc[name, 'spread']:.1g}"
            for name in SHOWN
            if name in scores.index and pd.notna(scores.loc[name, "value"])
        }
    for label, spread in table["retraining"].items():
        columns[label] = {
            name: f"{row['mean']:.3g} ({row['retraining']:.1g}, {row['sampling']:.1g})"
            for name, row in spread.items()
        }
    baseline_draws = pd.DataFrame(table["tables"]["teacher"]).T["real_vs_real"]
    columns["real against real"] = {
        name: f"{value:.3g}" for name, value in baseline_draws.items() if pd.notna(value)
    }
    return pd.DataFrame(columns).reindex(SHOWN).fillna("")


def verdicts(table: Mapping) -> pd.DataFrame:
    """Who is better than whom in which score, by the paired permutation test; else it is open."""
    return pd.DataFrame(
        {
            pair: {
                n: f"{row['verdict']} ({_chance(row['p'])})".replace("not distinguishable", "open")
                for n, row in rows.items()
            }
            for pair, rows in table["compared"].items()
        }
    ).fillna("")


def _chance(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def plans(results: str | Path | None = None) -> pd.DataFrame:
    """The rows of chapter 01 for the named and the found plans, with full-size latency."""
    study = stored(results)
    rows = study.rows[study.rows["candidate"].isin(study.timed.index)]
    columns = ["candidate", *(m for m in MEASURES if m in rows)]
    costs = study.timed[["parameter_ratio", "ratio"]].set_axis(
        ["parameter_ratio", "latency_ratio"], axis=1
    )
    return rows[columns].join(costs, on="candidate")


def beside_the_paper(results: str | Path | None = None) -> pd.DataFrame:
    """What KDC-Diff and BK-SDM (Kim et al. 2305.15798) state, ours, and whether they compare."""
    timed = stored(results).timed
    grades = ledger.read("mini_grades", results)
    shipped, teacher = grades["student"], grades["teacher"]
    distance = f"{shipped['fd']:.1f} (teacher {teacher['fd']:.1f})"
    clip = f"{shipped['clip_score'] / 100:.3f} (teacher {teacher['clip_score'] / 100:.3f})"
    count = shipped["samples"]
    rows = [
        ("teacher's U-Net, parameters", "859,520,964", f"{timed.loc['full', 'parameters']:,.0f}",
         "yes: counted"),
        ("student's U-Net, parameters", "482,346,884", f"{timed.loc['kdc', 'parameters']:,.0f}",
         "yes: counted"),
        ("student's U-Net, time of a call / teacher's", "-", f"{timed.loc['kdc', 'ratio']:.2f}",
         "a ratio, on two CPU cores"),
        ("Fréchet distance, KDC-Diff's public notebook", "255.8 (5 images against 11)", distance,
         f"no: {count} images of a mini model"),
        ("Fréchet distance, BK-SDM-Small on COCO-30K", "16.98 (Stable Diffusion 13.05)", distance,
         "no: photographs, Inception"),
        ("CLIP score, BK-SDM-Small on COCO-30K", ".2677 (Stable Diffusion .2958)",
         clip, "no: another CLIP"),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["what", "published", "ours", "comparable"])
    return table.set_index("what")
