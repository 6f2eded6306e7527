import json
import warnings

import numpy as np
import pytest

from kdc import ScoreMatrix

# Fréchet distances: the first task goes from 10 to 16, the second from 8 to 7.
LOWER = [[10, 30, 50], [13, 8, 45], [16, 7, 9]]
# Accuracies: the first task falls from 0.9 to 0.5, the second rises from 0.8 to 0.85.
HIGHER = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.5, 0.85, 0.7]]


def test_forgetting_by_hand_where_lower_is_better():
    m = ScoreMatrix(LOWER, False, start=[60, 40, 55], reference=[20, 21, 23, 26])
    assert m.forgotten().tolist() == [6, -1]
    assert m.forgetting == pytest.approx((6 - 1) / 2)
    assert m.backward_transfer == pytest.approx(-2.5)
    assert m.average_final == pytest.approx((16 + 7 + 9) / 3)
    assert m.plasticity == pytest.approx((10 + 8 + 9) / 3)
    # Task 1 went from 40 to 30 before it was learnt, task 2 from 55 to 45: gains of 10 each.
    assert m.forward_transfer == pytest.approx(10)
    assert m.retention == pytest.approx(-6)


def test_forgetting_by_hand_where_higher_is_better():
    m = ScoreMatrix(HIGHER, True, start=[0.1, 0.1, 0.2], reference=[0.9, 0.8, 0.85, 0.7])
    assert m.forgotten() == pytest.approx([0.4, -0.05])
    assert m.forgetting == pytest.approx((0.4 - 0.05) / 2)
    assert m.backward_transfer == pytest.approx(-0.175)
    assert m.average_final == pytest.approx((0.5 + 0.85 + 0.7) / 3)
    assert m.plasticity == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert m.forward_transfer == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    assert m.retention == pytest.approx(-0.2)


def test_the_mirrored_score_has_the_same_losses_and_gains():
    arrays = dict(start=np.array([60.0, 40, 55]), reference=np.array([20.0, 21, 23, 26]))
    a = ScoreMatrix(LOWER, False, **arrays).measures()
    b = ScoreMatrix(-np.array(LOWER), True, **{k: -v for k, v in arrays.items()}).measures()
    own_sense = ["average_final", "plasticity"]
    assert b[own_sense].tolist() == (-a[own_sense]).tolist()
    assert b.drop(own_sense).tolist() == a.drop(own_sense).tolist()


def test_what_is_undefined_is_not_a_number_and_says_so_quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = ScoreMatrix([[0.7]], True, start=[0.1])
        for name in ("forgetting", "backward_transfer", "forward_transfer", "retention"):
            assert np.isnan(alone.measures()[name])
        assert alone.average_final == alone.plasticity == 0.7
        lower = np.array(HIGHER)
        lower[np.triu_indices(3, 1)] = np.nan  # tasks ahead were not measured
        m = ScoreMatrix(lower, True, start=[0.1, 0.1, 0.2])
        assert np.isnan(m.forward_transfer) and m.forgetting == pytest.approx(0.175)
        lower[1, 1] = np.nan  # a mean over the rest would be another measure
        assert np.isnan(ScoreMatrix(lower, True).forgetting)


def test_a_sequence_under_way_has_fewer_rows_than_tasks():
    m = ScoreMatrix(LOWER[:2], False, start=[60, 40, 55])
    assert m.forgetting == pytest.approx(3) and m.average_final == pytest.approx((13 + 8) / 2)
    assert m.forward_transfer == pytest.approx(10)


def test_a_matrix_survives_json():
    values = np.array(LOWER, float)
    values[0, 2] = np.nan
    m = ScoreMatrix(values, False, "fd", ("a", "b", "c"), start=[1, 2, np.nan])
    again = ScoreMatrix.from_dict(json.loads(json.dumps(m.to_dict(), allow_nan=False)))
    assert again == m and again != ScoreMatrix(LOWER, False, "fd", ("a", "b", "c"))
    assert m.to_frame().loc["after b", "a"] == 13 and list(m.to_frame()) == ["a", "b", "c"]


def test_a_matrix_cannot_be_changed():
    values = np.array(LOWER, float)
    m = ScoreMatrix(values, False)
    values[0, 0] = 0
    assert m.values[0, 0] == 10
    with pytest.raises(ValueError):
        m.values[0, 0] = 0


def test_what_does_not_fit_is_refused():
    for arguments, message in (
        ((LOWER, "down"), "True or False: 'down'"),
        (([1, 2, 3], False), r"\(T, K\)"),
        ((np.ones((3, 2)), False), r"not \(3, 2\)"),
        ((LOWER, False, "m", ("a", "b")), "2 names for 3 tasks"),
        ((LOWER, False, "m", (), [1, 2]), "start must have 3"),
        ((LOWER, False, "m", (), None, [1, 2, 3]), "reference must have 4"),
    ):
        with pytest.raises(ValueError, match=message):
            ScoreMatrix(*arguments)
