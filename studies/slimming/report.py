"""What chapter 01 shows of the study of slimming: stored, or measured on a teacher of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from kdc.search import sensitivity
from kdc.unet.costs import count_costs
from kdc.unet.plans import SlimPlan, find_plan
from kdc.unet.slimming import slim, source_of
from studies.common import ledger
from studies.common.claims import Claim
from studies.common.protocol import Setup, prepare, score
from studies.slimming import full_size, stages, study


@dataclass
class Study:
    """What the searches found, every plan after equal recovery, and what the plans cost.

    `searched` is what `find_plans` gives, `rows` what `stored_recovery` gives, `timed` what
    `time_plans` gives (stored: at full size), `teacher` the teacher's own scores by seed.
    """

    searched: Mapping[str, dict]
    rows: pd.DataFrame
    timed: pd.DataFrame
    teacher: pd.DataFrame

    @property
    def found(self) -> dict[str, SlimPlan]:
        """The plans that the searches found."""
        return {name: SlimPlan.from_dict(entry["plan"]) for name, entry in self.searched.items()}

    @property
    def followed(self) -> dict[str, SlimPlan]:
        """Those of them that were let recover and timed."""
        return {name: plan for name, plan in self.found.items() if name in self.timed.index}


def stored(results: str | Path | None = None) -> Study:
    """The study of the mini teacher as it was stored, with the latencies at full size."""
    return Study(
        ledger.read("found_plans", results),
        stages.stored_recovery(results),
        pd.DataFrame(ledger.read("latency", results)["full size"]).T.astype(float),
        pd.DataFrame(ledger.read("recovery", results)["teacher"]),
    )


def measured(
    teacher: StableDiffusionPipeline,
    dataset: str | Path,
    scores: Mapping[str, pd.Series],
    settings: study.Settings,
    folder: str | Path,
) -> Study:
    """The same study on that teacher; all candidates with `settings.seeds`.

    `scores` gives each name of `study.CRITERIA` the importance of every part. Rows are kept in
    `folder` as soon as they are there. Random plans are not timed: their latency is missing.
    """
    setup = prepare(teacher, settings, dataset)
    own = study.budgets_of(setup)
    costs = {"time": stages.full_size_costs()}
    limits = own | {"time": stages.FAST}
    searched = study.find_plans(setup, scores, limits, settings, folder, costs)
    found = {name: SlimPlan.from_dict(entry["plan"]) for name, entry in searched.items()}
    plans = study.named_plans() | found
    candidates = {name: dict.fromkeys(settings.seeds, plan) for name, plan in plans.items()}
    candidates |= study.random_control(setup, own, settings.seeds)
    rows = study.recover(setup, candidates, settings, folder)
    timed = full_size.time_plans(teacher.unet, plans, **setup.inputs)
    rows["parameter_ratio"] = rows["parameters"] / timed.loc["full", "parameters"]
    rows["mac_ratio"] = rows["macs"] / timed.loc["full", "macs"]
    rows["latency_ratio"] = rows["candidate"].map(timed["ratio"])
    generated = [score(setup, teacher, seed) for seed in settings.seeds]
    return Study(searched, rows, timed, pd.DataFrame(generated))


def importances(
    setup: Setup, settings: study.Settings | None = None, **sampled
) -> tuple[dict[str, pd.DataFrame], dict[str, pd.Series]]:
    """How important parts are: `sensitivity` by guidance, and the scores of every criterion.

    Stored, or with `settings` measured on the bench's teacher; `sampled` goes to `sensitivity`.
    """
    rows, scores = {}, {}
    for name, how in study.CRITERIA.items():
        if how.recovery:
            scores[name] = (
                study.importance_after_recovery(setup, settings, how)
                if settings
                else stages.stored_scores(name)
            )
            continue
        table = (
            sensitivity(setup.teacher, setup.train, guidance=how.guidance, **sampled)
            if settings
            else stages.stored_importance(name)
        )
        rows[f"guidance {how.guidance:g}"], scores[name] = table, stages.scores_of(table)
    return rows, scores


CLAIMED = ("output_error", "accuracy", "fd")
SPELT = {"macs": "multiply-accumulates"}


def last_rounds(searched: Mapping[str, dict]) -> pd.DataFrame:
    """For every search the winner's place by other judgements, and the errors before and after."""
    rows = {}
    for name, entry in searched.items():
        table = pd.DataFrame(entry["finalists"])
        rows[name] = {
            "plans": len(table),
            "winner's place by importance": int(table["score"].rank()[0]),
            "by error after the cut": int(table["after_cut"].rank()[0]),
            "winner after the cut": table["after_cut"][0],
            "winner recovered": table["recovered"][0],
            "last recovered": table["recovered"].iloc[-1],
        }
    return pd.DataFrame(rows).T


def claims(found: Iterable[str]) -> list[Claim]:
    """What was claimed of the plans that were found, and the published order of the named ones.

    Those named "found: ..." are the last search's: better than "kdc" and than random plans of their
    budget. Claims about candidates that were not measured are left out by `claims.check`.
    """
    compared = [
        ("the published order", "bk-base", "kdc"),
        ("the published order", "kdc", "bk-tiny"),
    ]
    for name in found:
        limit = name.rpartition(": ")[2]
        text = f"a plan found for its {SPELT.get(limit, limit)} is better"
        compared += [(text, name, "kdc"), (text, name, f"random: {limit}")]
    return [Claim(*one, measure) for one in compared for measure in CLAIMED]


def blocks_of(unet: UNet2DConditionModel, plan: str | SlimPlan) -> pd.DataFrame:
    """`count_costs` of the student's blocks, by the names that they have in the teacher."""
    plan = find_plan(plan)
    table = count_costs(slim(unet, plan)).drop("total")
    return table.rename(lambda block: source_of(block, plan))


def side_by_side(tables: Mapping[str, pd.DataFrame], cost: str) -> pd.DataFrame:
    """One cost of several tables of blocks, a column each; NaN where one has no such block."""
    return pd.DataFrame({name: table[cost] for name, table in tables.items()})


def count_table(tables: Mapping[str, pd.DataFrame], published: Mapping[str, int]) -> pd.DataFrame:
    """What `blocks_of` counted beside the published numbers of parameters, as text."""
    totals = pd.DataFrame({name: table.sum() for name, table in tables.items()}).T
    claimed = pd.Series(published).reindex(totals.index)
    return pd.DataFrame(
        {
            "published": claimed.map("{:,}".format),
            "counted": totals["parameters"].map("{:,}".format),
            "equal": (claimed == totals["parameters"]).map({True: "yes", False: "NO"}),
            "share": (totals["parameters"] / totals["parameters"].iloc[0]).map("{:.1%}".format),
            "GMACs": (totals["macs"] / 1e9).map("{:.1f}".format),
            "without attention products": (totals["linear_macs"] / 1e9).map("{:.1f}".format),
        }
    )


def within(timed: pd.DataFrame, names: Iterable[str], latency: float = 0.45) -> list[str]:
    """Those plans that hold at most the parameters of `kdc`, at no more than that latency."""
    small = timed["parameter_ratio"] <= timed.loc["kdc", "parameter_ratio"]
    return [name for name in names if small[name] and timed.loc[name, "ratio"] <= latency]


def costs_of(tables: Mapping[str, pd.DataFrame], timed: pd.DataFrame) -> pd.DataFrame:
    """What `blocks_of` counted, in millions and billions and over "full", with measured latency.

    Columns: "million parameters", "GMACs", the ratios `parameters`, `macs`, `latency`, and the
    quartiles `low` and `high` of the last.
    """
    totals = pd.DataFrame({name: table.sum() for name, table in tables.items()}).T
    totals = totals[["parameters", "macs"]]
    table = pd.DataFrame(
        {"million parameters": totals["parameters"] / 1e6, "GMACs": totals["macs"] / 1e9}
    )
    measured = timed[["ratio", "ratio_low", "ratio_high"]].set_axis(
        ["latency", "low", "high"], axis=1
    )
    return table.join(totals / totals.loc["full"]).join(measured).astype(float)


def stored_seconds(results: str | Path | None = None) -> dict[bool, pd.Series]:
    """Seconds of every block of Stable Diffusion's U-Net as `block_seconds` measured them."""
    values = ledger.read("sd_blocks", results)
    return {False: pd.Series(values["whole"]), True: pd.Series(values["without stage 3"])}
