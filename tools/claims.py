"""The page of the protocol and of all claims, made from the studies and from `results/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from studies.common import ledger
from studies.common.claims import check, one_family, survivors
from studies.distillation import report as distillation
from studies.replay import report as replay
from studies.slimming import report as slimming

PAGE = Path(__file__).parents[1] / "notebooks" / "claims.md"
HEAD = """# Protocol, and all claims

## Protocol

**Beforehand.** A claim says which of two candidates is better by which score, and is written in
the code of its study before its rows are measured. What was added later says so in its chapter.

**Differences** are paired by seed: both candidates start from the same weights and see the same
images and noise. Where they share no seed, means are compared. Intervals are Student's (or
Welch's), of 95 %; p-values those of the two-sided t-test of no difference.

**Refuted** is a claim whose difference is significant on the other side. *Open* is what the seeds
cannot tell: that no difference was seen does not show that there is none, and a claim of no
difference is never more than open here.

**Corrected.** All claims of a chapter are one family. *p, Holm* is the p-value adjusted for their
number (Holm 1979): at .05, the chance of one false rejection or more among all of them is at most
5 %. An outcome in italics does not survive it.

**Limits.** Most families have three seeds. With three pairs, a difference must be some five times
as large as its standard error to have p < .05, so small effects could not have been seen. The
studies are being repeated on a harder world, with fewer claims, more seeds and margins named
beforehand; this page then follows.
"""
MARKS = {"holds": "✓ holds", "refuted": "✗ refuted", "open": "? open"}


def _replay(*stages: str) -> Callable[[], dict[str, pd.DataFrame]]:
    def found() -> dict[str, pd.DataFrame]:
        return {
            f"forgetting_{stage}": replay.check_stage(stage, replay.table(replay.stored(stage)))
            for stage in stages
        }

    return found


def _slimming() -> dict[str, pd.DataFrame]:
    study = slimming.stored()
    return {"recovery": check(study.rows, slimming.claims(study.followed))}


def _distillation() -> dict[str, pd.DataFrame]:
    every = [claim for part in distillation.CLAIMS.values() for claim in part]
    return {"distillation": check(distillation.stored()[0], every)}


# By chapter: what is claimed, by the result file that carries it.
FAMILIES: dict[str, Callable[[], dict[str, pd.DataFrame]]] = {
    "01_unet_slimming": _slimming,
    "03_what_terms_are_worth": _distillation,
    "04_forgetting": _replay("domains", "teachers", "plain", "photos"),
    "05_buffers": _replay("buffers", "ratios", "classes"),
    "07_full_scale": _replay("species"),
}


GOALS = "04_forgetting"  # the chapter that has goals beside claims


def family(chapter: str) -> pd.DataFrame:
    """All claims of a chapter, with "file" and with p-values adjusted for their number."""
    tables = FAMILIES[chapter]()
    return one_family(table.assign(file=name) for name, table in tables.items())


def page() -> str:
    """The page, from what is stored."""
    parts = [HEAD]
    for chapter in FAMILIES:
        claims = family(chapter)
        number = chapter.partition("_")[0]
        parts.append(
            f"\n## Chapter {number}\n\n[{chapter}]({chapter}.ipynb): {survivors(claims)}.\n"
        )
        for file, table in claims.groupby("file", sort=False):
            made = ledger.provenance_of(file)
            seeds = [*made["seeds"], *made.get("fresh_seeds", ())]
            parts.append(
                f"\n`results/{file}.json`: seeds {', '.join(map(str, seeds))}; commit"
                f" `{made['commit']}`; {made['device']}, {made['threads']} threads.\n\n"
                "| claim | compared, by which score | difference [95 %] | p, Holm | outcome |\n"
                "|---|---|--:|--:|---|\n"
            )
            parts += map(_line, table.to_dict("records"))
        if chapter == GOALS:
            parts.append(_goals())
    return "".join(parts)


def _goals() -> str:
    """The goals of the chapter on forgetting, which were set as numbers."""
    lines = replay.table(replay.stored("domains"))
    alone = replay.table(replay.stored("teachers")).query("candidate == 'replay, task only'")
    rows = []
    for name, row in replay.goals(pd.concat([lines, alone])).iterrows():
        met = "surely" if row["surely"] else "on the mean" if row["met"] else "missed"
        value = f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
        rows.append(f"| {name} | {value} | {row['goal']:g} | {met} |\n")
    head = "\nGoals, by means over sequences, with Student's 95 % interval:\n\n"
    return head + "| goal | value [95 %] | asked | met |\n|---|--:|--:|---|\n" + "".join(rows)


def _line(row: dict) -> str:
    difference = f"{row['mean']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}]"
    p = "< .001" if row["adjusted"] < 0.001 else f"{row['adjusted']:.3f}".lstrip("0")
    outcome = MARKS[row["outcome"]]
    if row["outcome"] != "open" and row["adjusted"] >= 0.05:
        outcome = f"*{outcome}*"
    score = row["measure"].replace("_", " ")
    compared = f"{row['candidate']} − {row['baseline']}, {score}"
    return f"| {row['claim']} | {compared} | {difference} | {p} | {outcome} |\n"


def write() -> None:
    """Write the page where it has changed."""
    text = page()
    if not PAGE.is_file() or PAGE.read_text("utf-8") != text:
        PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    write()
