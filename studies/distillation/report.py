"""What chapter 03 shows of the study of distillation: its claims, and figures of what is stored."""

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
from kdc.distillation.losses import TERMS
from studies.common import ledger
from studies.common.claims import Claim
from studies.common.protocol import MEASURES, cut, higher_is_better, prepare, score
from studies.common.recipes import RECIPES
from studies.distillation.study import SHOWN, Settings, study

FIRST, *OTHERS = TERMS
PAIRS = tuple(f"{FIRST}, {name}" for name in OTHERS)
AVERAGED = "authors' terms, features averaged"
MAIN = (FIRST, *PAIRS, "corrected", AVERAGED)  # from copied weights, and then from random ones
SINGLE = tuple(TERMS)
BOTH, OUTPUT, SOFT = (f"features averaged, {what} corrected" for what in ("both", "output", "soft"))

# What the chapter opens with: what each recipe draws.
OPENING = ("teacher", FIRST, f"{FIRST}, output", f"{FIRST}, feature", AVERAGED, BOTH)

# Written before the study ran. Each: what is claimed, the recipe, what it is compared with, the
# measure, and what is expected if it is not "better".
OF_TERMS = [
    Claim("the output term helps", "task, output", "task", "output_error"),
    Claim("the soft term helps", "task, soft", "task", "output_error"),
    Claim("it helps less than the output", "task, soft", "task, output", "output_error", "worse"),
    Claim("the feature term helps", "task, feature", "task", "accuracy"),
    Claim(
        "the feature term helps from a random start",
        "random start: task, feature",
        "random start: task",
        "accuracy",
    ),
    Claim("the task term adds nothing", "without task", "corrected", "accuracy", "open"),
    Claim("copied weights are a head start", "task", "random start: task", "accuracy"),
    Claim(
        "copied weights are a head start for the whole loss",
        "corrected",
        "random start: corrected",
        "accuracy",
    ),
]
OF_FAULTS = [
    Claim("the dead output term costs", OUTPUT, AVERAGED, "output_error"),
    Claim("the summed soft term costs", SOFT, AVERAGED, "output_error"),
    Claim("the summed soft term costs more", SOFT, OUTPUT, "output_error"),
    Claim("the newest terms are worse", "authors' newest terms", AVERAGED, "accuracy", "worse"),
]
# Written after the rows of the other recipes were seen, before this one's were measured.
OF_BOTH = [
    Claim("both corrections are better than one", BOTH, SOFT, "output_error"),
    Claim("both corrections are as accurate as one", BOTH, SOFT, "accuracy", "not worse"),
    Claim("both corrections beat the corrected weights", BOTH, "corrected", "accuracy"),
]
OF_OPTIONS = [
    Claim("a sharp softmax changes nothing", "temperature 0.5", "corrected", "accuracy", "open"),
    Claim("a flat softmax changes nothing", "temperature 8", "corrected", "accuracy", "open"),
    Claim("attentions give better features", "features at attentions", "corrected", "accuracy"),
    Claim("both places give better features", "features at both", "corrected", "accuracy"),
    Claim("raw features are worse", "raw features", "corrected", "accuracy", "worse"),
    Claim(
        "no caption dropout harms guidance", "no caption dropout", "corrected", "accuracy", "worse"
    ),
    Claim("the teacher's images reach new combinations", "teacher-made", "corrected", "unseen"),
    Claim("swapped captions reach new combinations", "swapped captions", "without task", "unseen"),
]


def _goals() -> list[Claim]:
    """The goals of the project, as claims about the corrected loss."""
    beats = f"the corrected loss beats {AVERAGED}"
    whole = "the whole loss is no worse than this part"
    goals = [
        Claim(beats, f"{start}corrected", f"{start}{AVERAGED}", measure)
        for start in ("", "random start: ")
        for measure in MEASURES
    ]
    goals += [
        Claim(whole, "corrected", part, measure, "not worse")
        for part in (*SINGLE, *PAIRS)
        for measure in ("accuracy", "fd", "output_error")
    ]
    return goals


CLAIMS = {
    "the corrected loss": _goals(),
    "the terms": OF_TERMS,
    "the faults": OF_FAULTS,
    "the options": OF_OPTIONS,
    "both corrections": OF_BOTH,
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
    ranks = {m: means[m].rank(ascending=not higher_is_better(m)) for m in present}
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
