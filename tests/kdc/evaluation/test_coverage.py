"""Reported uncertainty is true: intervals hold what theory says 19 times in 20.

Each test repeats an experiment on Gaussians whose answer is known. It counts how often the interval
holds the answer, and fails where a procedure of exactly 95 % would give such a count less than once
in ten thousand times. The level of the permutation test is tested with it.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from kdc.evaluation.metrics import METRICS, frechet_distance, kernel_distance, precision_recall
from kdc.evaluation.statistics import real_vs_real, student_interval

WIDTH, COUNT, SEEDS = 8, 64, 5


def draw(generator, count=COUNT, shift=0.0):
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    x[:, 0] += shift
    return x


def plausible(hits, trials, chance=0.95):
    """Whether so many hits may happen, by a two-sided test at one in ten thousand."""
    return stats.binomtest(int(hits), trials, chance).pvalue > 1e-4


def cubic(a, b, d=WIDTH):
    """E (x.y / d + 1)^3 for independent x ~ N(a, I), y ~ N(b, I), by the moments of x.y."""
    m = float(a @ b)
    first = m
    second = m**2 + b @ b + a @ a + d
    third = m**3 + 3 * m * (b @ b) + 3 * m * (a @ a + d + 2)
    return 1 + 3 * first / d + 3 * second / d**2 + third / d**3


def true_kid(shift):
    a, b = np.zeros(WIDTH), np.eye(WIDTH)[0] * shift
    return cubic(a, a) + cubic(b, b) - 2 * cubic(a, b)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_the_interval_of_kid_holds_the_true_distance(shift):
    """Disjoint sets of one distribution, and of two whose distance has a closed form."""
    generator, hits, trials = torch.Generator().manual_seed(int(10 * shift)), 0, 300
    for _ in range(trials):
        values = [
            kernel_distance(draw(generator, shift=shift), draw(generator)) for _ in range(SEEDS)
        ]
        low, high = student_interval(values)
        hits += low <= true_kid(shift) <= high
    assert plausible(hits, trials), f"{hits} of {trials}"


def test_the_closed_form_is_that_of_many_samples():
    generator = torch.Generator().manual_seed(1)
    x, y = draw(generator, 2000, 1.5), draw(generator, 2000)
    assert kernel_distance(x, y) == pytest.approx(true_kid(1.5), rel=0.15)


@pytest.mark.parametrize("name", ["fd", "kid"])
def test_real_sets_that_were_not_seen_score_what_the_baseline_says(name):
    """A prediction by the baseline of one pool, about two sets that share nothing with it."""
    measure, hits, trials = METRICS[name].measure, 0, 150
    generator = torch.Generator().manual_seed(5)
    draws = 10
    for _ in range(trials):
        mean, spread = real_vs_real(measure, draw(generator, 40 * COUNT), COUNT, draws)
        half = stats.t.ppf(0.975, draws - 1) * spread * np.sqrt(1 + 1 / draws)
        hits += abs(measure(draw(generator), draw(generator)) - mean) <= half
    assert plausible(hits, trials), f"{hits} of {trials}"


def test_the_frechet_distance_of_many_samples_is_the_shift_squared():
    """Its bias falls as 1 / count: two counts give the limit, which has a closed form."""
    generator, shift = torch.Generator().manual_seed(2), 1.5
    means = [
        np.mean(
            [frechet_distance(draw(generator, n, shift), draw(generator, n)) for _ in range(20)]
        )
        for n in (500, 1000)
    ]
    assert means[0] > means[1] > shift**2
    assert 2 * means[1] - means[0] == pytest.approx(shift**2, rel=0.03)


def test_identical_sets_are_at_no_distance():
    x = draw(torch.Generator().manual_seed(3))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert precision_recall(x, x) == (1.0, 1.0)
    kernel = (x @ x.T / WIDTH + 1) ** 3
    apart = (kernel.sum() - kernel.trace()) / (COUNT * (COUNT - 1))
    expected = 2 * (apart - kernel.mean())  # below 0: each point is compared with itself too
    assert kernel_distance(x, x) == pytest.approx(expected.item(), rel=1e-5)
    assert kernel_distance(x, x) < 0
