"""What chapter 02 shows of the study of distillation: its claims, and figures of what is stored."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from kdc.distillation import losses
from studies.common import ledger
from studies.common.claims import Claim, read_claims
from studies.common.protocol import MEASURES, cut, prepare, score
from studies.common.recipes import RECIPES
from studies.distillation.study import SHOWN, Settings, study

MAIN = tuple(RECIPES)[:6]  # from copied weights; the same six follow from random ones
SINGLE = ("task", "output", "soft", "feature")


# Written before the study ran; "the corrected loss" are the project's goals. Each line: what is
# claimed, the recipe, its baseline, the measure, and what is expected if it is not "better".
_TERMS = """
the output term helps | task, output | task | output_error
the soft term helps | task, soft | task | output_error
but less | task, soft | task, output | output_error | worse
the feature term helps | task, feature | task | accuracy
also from a random start | random start: task, feature | random start: task | accuracy
the data's own noise adds nothing | without task | corrected | accuracy | open
copied weights are a head start | task | random start: task | accuracy
also for the whole loss | corrected | random start: corrected | accuracy
"""
_DEFECTS = """
the dead output term costs | features averaged, output corrected | authors' terms, features averaged | output_error
the summed soft term costs | features averaged, soft corrected | authors' terms, features averaged | output_error
and costs more | features averaged, soft corrected | features averaged, output corrected | output_error
the newest commit is worse | authors' newest terms | authors' terms, features averaged | accuracy | worse
"""
# Written after the rows of the other recipes were seen, before this one's were measured.
_LATER = """
both mends are better than one | features averaged, both corrected | features averaged, soft corrected | output_error
and draw no worse | features averaged, both corrected | features averaged, soft corrected | accuracy | not worse
and are better than the corrected weights | features averaged, both corrected | corrected | accuracy
"""
_OPTIONS = """
a sharp softmax changes nothing | temperature 0.5 | corrected | accuracy | open
a flat softmax changes nothing | temperature 8 | corrected | accuracy | open
attentions are better hooks | features at attentions | corrected | accuracy
so are both | features at both | corrected | accuracy
raw features are worse | raw features | corrected | accuracy | worse
no caption dropout harms guidance | no caption dropout | corrected | accuracy | worse
the teacher's images reach new combinations | teacher-made | corrected | unseen
so do swapped captions | swapped captions | without task | unseen
"""


def _goals() -> list[Claim]:
    published, whole = (
        "corrected beats authors' terms, features averaged",
        "the whole loss is no worse than this part",
    )
    starts = ("", "random start: ")
    return [
        *(
            Claim(
                published, f"{start}corrected", f"{start}authors' terms, features averaged", measure
            )
            for start in starts
            for measure in MEASURES
        ),
        *(
            Claim(whole, "corrected", part, measure, "not worse")
            for part in (*SINGLE, *MAIN[1:4])
            for measure in ("accuracy", "fd", "output_error")
        ),
    ]


CLAIMS = {
    "the corrected loss": _goals(),
    "the terms": read_claims(_TERMS),
    "the defects": read_claims(_DEFECTS),
    "the options": read_claims(_OPTIONS),
    "both mends": read_claims(_LATER),
}
FURTHER = tuple(CLAIMS)[1:]


def stored(results: str | Path | None = None) -> tuple[pd.DataFrame, dict, pd.DataFrame]:
    """The study's rows, its logs by recipe (a table a seed), and the teacher's scores by seed."""
    values = ledger.read("distillation", results)
    logs = {name: [pd.DataFrame(log) for log in runs] for name, runs in values["logs"].items()}
    return pd.DataFrame(values["rows"]), logs, pd.DataFrame(values["teacher"])


def measured(
    teacher: StableDiffusionPipeline,
    dataset: str | Path,
    settings: Settings,
    folder: str | Path,
    plan: str = "kdc",
) -> tuple[pd.DataFrame, dict, pd.DataFrame]:
    """The same study on a teacher and images of one's own; rows are kept in `folder`.

    Students of the plan "kdc" are cut by `plan` instead. Where the attributes of the images are
    not known, the output error is the only measure, and recipes that make or caption images by
    attributes are left out.
    """
    setup = prepare(teacher, settings, dataset)
    recipes = {
        name: dataclasses.replace(recipe, plan=plan) if recipe.plan == "kdc" else recipe
        for name, recipe in RECIPES.items()
        if setup.asked or recipe.data == "real"
    }
    rows, logs = study(setup, settings, folder, recipes)
    goal = pd.DataFrame([{"seed": s} | score(setup, teacher, s) for s in settings.seeds])
    return rows, {n: [pd.DataFrame(x) for x in runs] for n, runs in logs.items()}, goal


def best(rows: pd.DataFrame) -> str:
    """The recipe of the plan "kdc" with the lowest rank, averaged over the measures.

    Ranks are those of means over seeds. The rule was fixed before the study ran.
    """
    names = [name for name in rows["candidate"].unique() if RECIPES[name].plan == "kdc"]
    present = [measure for measure in MEASURES if measure in rows]
    means = rows.groupby("candidate")[present].mean().loc[names]
    ranks = {m: means[m].rank(ascending=MEASURES[m] == "lower") for m in present}
    return str(pd.DataFrame(ranks).mean(axis=1).idxmin())


def gap_closed(rows: pd.DataFrame, teacher: pd.DataFrame, start: str = "task") -> pd.DataFrame:
    """How much of the way from the recipe `start` to the teacher each recipe goes, by measure.

    1 is the teacher, 0 is `start`, below 0 is worse than that. Means over seeds; the teacher's own
    output error is 0.
    """
    present = [measure for measure in MEASURES if measure in rows]
    means = rows.groupby("candidate", sort=False)[present].mean()
    goal = teacher.assign(output_error=0.0)[present].mean()
    return (means - means.loc[start]) / (goal - means.loc[start])


def shown(results: str | Path | None = None) -> tuple[dict[str, list[np.ndarray]], tuple[str, ...]]:
    """What the teacher and the student of every recipe draw from one seed, and the captions."""
    sheet = np.asarray(Image.open(Path(results or ledger.RESULTS) / "distillation.png"))
    names = ("teacher", *dict.fromkeys(stored(results)[0]["candidate"]))
    return cut(sheet, names, len(SHOWN)), SHOWN


def closed_forms(seed: int = 1) -> tuple[dict[str, dict], float]:
    """The terms on random predictions, as panels of `figures.lines`, and a limit in closed form.

    "limit": the soft term by temperature, which tends to half the mean square of the
    channel-centred error, the second value. "null space": output and soft term of an error that all
    channels share, by its size. "feature term": normalised and raw, by the unit of the features.
    "gradients": how far central differences are off, by their step; see `_gradient_errors`.
    """
    draw = torch.Generator().manual_seed(seed)
    right, wrong = (torch.randn(8, 4, 16, 16, generator=draw) for _ in range(2))
    shift = torch.randn(8, 1, 16, 16, generator=draw)
    error = wrong - right
    limit = (error - error.mean(dim=1, keepdim=True)).square().mean().item() / 2
    hot, sizes = np.geomspace(0.5, 100, 20), np.geomspace(0.1, 10, 9)
    moved = [right + size * shift for size in sizes]
    blind = [max(losses.soft_term(x, right, 2.0, "mean").item(), 1e-12) for x in moved]
    seen = [(x - right).square().mean().item() for x in moved]
    features = {
        name: [losses.feature_term([k * wrong], [k * right], on).item() for k in sizes]
        for name, on in (("normalised", True), ("raw", False))
    }
    panels = {
        "limit": {"soft term": (hot, [losses.soft_term(wrong, right, t, "mean") for t in hot])},
        "null space": {"output term": (sizes, seen), "soft term": (sizes, blind)},
        "feature term": {name: (sizes, values) for name, values in features.items()},
        "gradients": _gradient_errors(draw),
    }
    return panels, limit


def _gradient_errors(draw: torch.Generator) -> dict[str, tuple[np.ndarray, list[float]]]:
    """Relative error |difference - gradient| / |gradient| of central differences, in float64.

    The difference of step h errs by h^2 times a third derivative, which a square does not have, and
    by round-off over h. `gradient` is autograd's, in the student's prediction and its one hook.
    """
    noise = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    at, target, teacher, hooked = noise(38), noise(2, 4, 2, 2), noise(2, 4, 2, 2), noise(2, 3)
    losses_of = {
        "corrected loss": losses.LossWeights(),
        "soft": losses.LossWeights.only("soft"),
        "task, output, feature": losses.LossWeights.only("task", "output", "feature"),
    }
    steps, every = np.logspace(-1, -7, 13), torch.eye(len(at), dtype=torch.float64)

    def total(x, loss):
        student, ours = x[: target.numel()].reshape(target.shape), x[target.numel() :]
        return loss(student, target, teacher, [ours.reshape(hooked.shape)], [hooked])["loss"]

    errors = {"$h^2$": (steps, list(steps**2))}
    for name, weights in losses_of.items():
        loss = functools.partial(total, loss=losses.DistillationLoss(weights))
        gradient, values = torch.func.grad(loss)(at), torch.func.vmap(loss)
        differences = [(values(at + h * every) - values(at - h * every)) / (2 * h) for h in steps]
        off = [((d - gradient).norm() / gradient.norm()).item() for d in differences]
        errors[name] = (steps, off)
    return errors
