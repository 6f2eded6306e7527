"""Which of two evaluated pipelines is better, and how much of a score is the luck of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kdc.evaluation.evaluate import Scores, check_alike
from kdc.evaluation.metrics import metric_of
from kdc.evaluation.statistics import apart, permutation_test


def compare(
    ours: Scores,
    theirs: Scores,
    *,
    may_differ: Sequence[str] = (),
    permutations: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Which of two pipelines is better, score by score: difference, p-value, verdict.

    Both were evaluated with the same prompts, seeds and settings, so images are paired by prompt
    and noise; see `permutation_test`. `may_differ` names settings that need not be the same, such
    as "steps". `verdict` is "better" or "worse" below p = 0.05, else "not distinguishable". This is
    about these two networks: whether another training of them would come out alike, no test on one
    training can say (see `retraining`). Raises `ValueError` where the evaluations do not match.
    """
    check_alike(ours.generated_with, theirs.generated_with, may_differ)
    rows = {}
    for name in ours.by_seed:
        metric = metric_of(name)
        if name not in theirs.by_seed or "seeds" in metric.needs:  # no pairs of one seed
            continue
        if metric.of_sets:
            if not torch.equal(ours.reference, theirs.reference):
                raise ValueError("the evaluations differ in their reference images")
            a, b, statistic = ours.features, theirs.features, _set_difference(name, ours)
            shape = a.shape
            a, b = a.flatten(0, 1), b.flatten(0, 1)
            found = permutation_test(
                lambda x, y, f=statistic, s=shape: f(x.view(s), y.view(s)), a, b, permutations, seed
            )
        elif metric.per_image:
            a, b = (one.per_image[name].flatten() for one in (ours, theirs))
            found = permutation_test(
                lambda x, y: (x.mean() - y.mean()).item(), a, b, 10 * permutations, seed
            )
        else:  # one number for the networks: nothing to permute
            continue
        good = (found[0] > 0) == metric.higher_is_better
        verdict = ("better" if good else "worse") if found[1] < 0.05 else "not distinguishable"
        rows[name] = {"difference": found[0], "p": found[1], "verdict": verdict}
    return pd.DataFrame(rows).T.rename_axis("score")


def retraining(evaluations: Sequence[Scores]) -> pd.DataFrame:
    """Scores of one recipe trained several times: mean, and the spread of sampling and retraining.

    See `statistics.apart`; the one value of diversity that two seeds give is left out. Raises
    `ValueError` for fewer than two trainings or sampling seeds.
    """
    shared = [
        name
        for name in evaluations[0].by_seed
        if all(len(e.by_seed.get(name, ())) == len(e.generated_with["seeds"]) for e in evaluations)
    ]
    found = {name: apart([e.by_seed[name] for e in evaluations]) for name in shared}
    return pd.DataFrame(found).T.rename_axis("score")


def _set_difference(name: str, ours: Scores) -> Callable[[Tensor, Tensor], float]:
    measure, reference = metric_of(name).measure, ours.reference

    def difference(a: Tensor, b: Tensor) -> float:
        pairs = zip(a, b, strict=True)
        return float(np.mean([measure(x, reference) - measure(y, reference) for x, y in pairs]))

    return difference
