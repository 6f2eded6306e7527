import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from kdc.evaluation import metrics, statistics
from kdc.evaluation.metrics import frechet_distance


def normal(count, width, seed, mean=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(count, width, generator=generator, dtype=torch.float64)


def test_fid_agrees_with_another_package_and_with_the_closed_form():
    a, b = normal(400, 8, 0), normal(400, 8, 1, 0.5, 1.3)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(x) for x in (a, b)), verbose=False
    )["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    # |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) for diagonal Gaussians with known moments
    large = normal(200_000, 2, 2), normal(200_000, 2, 3, 1.0, 2.0)
    assert frechet_distance(*large) == pytest.approx(2 * (1 + (2 - 1) ** 2), rel=0.02)


def test_kid_agrees_with_another_package_and_is_unbiased():
    a, b = normal(120, 8, 0), normal(120, 8, 1, 0.3)
    theirs = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=120, verbose=False)[
        "kernel_inception_distance_mean"
    ]
    assert metrics.kernel_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    same = [
        metrics.kernel_distance(normal(60, 4, 2 * i), normal(60, 4, 2 * i + 1)) for i in range(40)
    ]
    low, high = statistics.student_interval(same, 0.999)  # fails by chance once in 1,000 seeds
    assert low < 0 < high and min(same) < 0
    state = torch.random.get_rng_state()
    metrics.kernel_distance(a, b)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_precision_and_recall_see_what_is_missing():
    real = torch.cat([normal(100, 4, 0), normal(100, 4, 1, 30.0)])
    half = normal(200, 4, 2)
    precision, recall = metrics.precision_recall(half, real)
    assert precision > 0.8 and 0.35 < recall < 0.55  # one of two modes
    assert metrics.precision_recall(real, real) == (1.0, 1.0)
    assert metrics.precision_recall(normal(50, 4, 3, 500.0), real) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than 4"):
        metrics.precision_recall(real[:4], real)


def test_the_baseline_is_what_disjoint_halves_score():
    real = normal(200, 2, 0)
    halves = []
    mean, deviation = statistics.real_vs_real(
        lambda a, b: halves.append((a, b)) or float(len(a)), real, 60, draws=3
    )
    assert (mean, deviation, len(halves)) == (60, 0, 3)
    for a, b in halves:
        assert len(torch.cat([a, b]).unique(dim=0)) == 120
    assert np.isnan(statistics.real_vs_real(frechet_distance, real, 101)).all()


def test_the_permutation_test_is_level_and_finds_a_difference():
    def difference(a, b):
        return (a.mean() - b.mean()).item()

    false_alarms = 0
    for i in range(100):
        shared = normal(30, 1, 3 * i)
        a, b = shared + normal(30, 1, 3 * i + 1), shared + normal(30, 1, 3 * i + 2)
        p = statistics.permutation_test(difference, a, b, 99, seed=i)[1]
        false_alarms += p <= 0.05
    assert false_alarms <= 14  # binomial(100, 0.05): more than 14 by chance once in 10,000
    a = normal(30, 1, 0)
    observed, p = statistics.permutation_test(difference, a + 0.1, a, 99)
    assert observed == pytest.approx(0.1) and p == 0.01
    with pytest.raises(ValueError, match="pairs"):
        statistics.permutation_test(difference, a, a[:5])


def test_holms_correction_of_a_known_example_and_of_true_nulls():
    """Of many families of ten true nulls, about one in twenty has a false rejection."""
    assert statistics.holm([0.01, 0.04, math.nan, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True
    )
    families = np.random.default_rng(0).uniform(size=(2000, 10))
    rejected = np.mean([min(statistics.holm(list(family))) < 0.05 for family in families])
    assert rejected == pytest.approx(0.05, abs=0.015)


def test_sampling_and_retraining_are_told_apart():
    rng = np.random.default_rng(0)
    found = {"sampling": [], "retraining": []}
    for _ in range(60):
        trained = rng.normal(5, 2, size=(8, 1))
        parts = statistics.apart(trained + rng.normal(0, 1, size=(8, 6)))
        for name in found:
            found[name].append(parts[name] ** 2)
    assert np.mean(found["sampling"]) == pytest.approx(1, rel=0.1)
    assert np.mean(found["retraining"]) == pytest.approx(4, rel=0.3)
    alike = statistics.apart([[1.0, 3.0], [1.0, 3.0]])
    assert alike == {"mean": 2.0, "sampling": pytest.approx(2**0.5), "retraining": 0.0}
    with pytest.raises(ValueError, match="two models"):
        statistics.apart([[1.0, 2.0]])
