"""How sure scores are: baselines of real images, intervals over seeds, tests by permutation.

Nothing here draws with replacement: that shows a set to itself and biases Fréchet distance and KID.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor


def real_vs_real(
    measure: Callable[[Tensor, Tensor], float],
    reference: Tensor,
    count: int,
    draws: int = 10,
    seed: int = 0,
) -> tuple[float, float]:
    """What real images score against real ones at that count: mean and deviation over draws.

    Each draw splits 2 x `count` of the reference's rows into two halves that share none. NaN for
    both where there are not so many.
    """
    if len(reference) < 2 * count:
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        rows = torch.randperm(len(reference), generator=generator)[: 2 * count]
        values.append(measure(reference[rows[:count]], reference[rows[count:]]))
    return float(np.mean(values)), float(np.std(values, ddof=1))


def share_nearer(features: Tensor, one: Tensor, other: Tensor) -> float:
    """The share of features (N, d) whose nearest neighbour, by cosine, is in `one` and not `other`.

    Both are sets (M, d) of equal size; a half is what strangers of both have.
    """
    if len(one) != len(other):
        raise ValueError(f"sets of equal size are needed, not {len(one)} and {len(other)}")
    generated, *sets = (F.normalize(x, dim=1) for x in (features, one, other))
    near, far = ((generated @ rows.T).amax(dim=1) for rows in sets)
    return (near > far).float().mean().item()


def student_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean; NaN below two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def welch_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float]:
    """Welch's interval of the difference of two means, a - b; NaN below two values in either."""
    if min(len(a), len(b)) < 2:
        return float("nan"), float("nan")
    found = stats.ttest_ind(a, b, equal_var=False).confidence_interval(confidence)
    return float(found.low), float(found.high)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for testing all of them (Holm, Scand. J. Statist. 6, 1979, 65-70).

    Rejecting where the adjusted value is at most alpha, the chance of one false rejection or more
    among all is at most alpha. NaN stays NaN and counts as no test.
    """
    order = sorted((value, index) for index, value in enumerate(p) if not math.isnan(value))
    adjusted, largest = [float("nan")] * len(p), 0.0
    for rank, (value, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * value))
        adjusted[index] = largest
    return adjusted


def permutation_test(
    statistic: Callable[[Tensor, Tensor], float],
    a: Tensor,
    b: Tensor,
    permutations: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """The difference statistic(a, b), and the two-sided p-value that it is chance.

    a, b (N, ...) are paired by row, as images of two models from one prompt and one noise are.
    Were the models the same, each pair might as well stand the other way round: every permutation
    swaps a random half of the pairs. `statistic` must change its sign when all pairs are swapped.
    """
    if a.shape != b.shape:
        raise ValueError(f"pairs needed, but shapes are {tuple(a.shape)} and {tuple(b.shape)}")
    generator = torch.Generator().manual_seed(seed)
    observed, extreme = statistic(a, b), 0
    shape = (len(a), *(1,) * (a.ndim - 1))
    for _ in range(permutations):
        swap = torch.rand(shape, generator=generator) < 0.5
        value = statistic(torch.where(swap, b, a), torch.where(swap, a, b))
        extreme += abs(value) >= abs(observed) - 1e-12
    return observed, (1 + extreme) / (1 + permutations)


def apart(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    """The spread of retraining and of sampling, kept apart.

    A group holds the scores of one trained model, one for each sampling seed; the groups are of
    one size. `sampling` is the pooled deviation within groups; `retraining` that between models
    with the part that sampling explains taken out (a one-way random-effects model), at least 0.
    """
    table = np.array(groups, dtype=float)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError("at least two models with two sampling seeds each are needed")
    within = table.var(axis=1, ddof=1).mean()
    between = table.mean(axis=1).var(ddof=1) - within / table.shape[1]
    return {
        "mean": float(table.mean()),
        "sampling": float(np.sqrt(within)),
        "retraining": float(np.sqrt(max(0.0, between))),
    }
