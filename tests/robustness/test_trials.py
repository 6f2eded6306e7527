"""Kills, damage and broken input: a few of each here, by the hundred and thousand by hand."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.robustness import faults, trials


@pytest.mark.parametrize("name", [n for n in trials.TARGETS if n != "arguments"])
def test_broken_input_is_read_rightly_or_refused_by_name(name, tmp_path_factory):
    """Each target checks what it reads; 20 seconds are taken for a hang."""
    folder = tmp_path_factory.mktemp("fuzz")

    @settings(max_examples=80, deadline=20_000, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 2**40))
    def check(seed):
        assert trials.TARGETS[name](random.Random(seed), folder) in ("read", "refused")

    check()


@settings(max_examples=60, deadline=20_000, derandomize=True, database=None)
@given(st.integers(0, 2**40).filter(lambda seed: seed % 7))
def test_any_arguments_are_taken_or_refused(seed):
    assert trials.fuzz_arguments(random.Random(seed), None) in ("read", "refused")


def test_what_goes_wrong_is_counted_and_told(monkeypatch):
    def hanging(draw, folder):
        while True:
            pass

    def crashing(draw, folder):
        raise IndexError("deep inside")

    monkeypatch.setattr(trials, "TARGETS", {"hangs": hanging, "crashes": crashing})
    rows = trials.fuzz(2, 0, seconds=0.2)
    assert [len(row["wrong"]) for row in rows] == [2, 2]
    assert "TimeoutError" in rows[0]["wrong"][0] and "deep inside" in rows[1]["wrong"][1]


@pytest.mark.long
def test_killed_runs_end_as_those_that_were_not():
    rows = trials.kills(2, seed=11)
    assert all(row["equal"] for row in rows), rows
    assert all(row["deaths"] for row in rows)


@pytest.mark.long
def test_damaged_checkpoints_are_passed_over_or_refused():
    rows = trials.damage(5, seed=11)
    assert {row["outcome"] for row in rows} <= {"resumed, equal", "refused by name"}, rows


def test_every_kind_of_fault_is_tried_again():
    kinds = [kind for kind, _, _ in faults.TRIALS]
    assert set(kinds) == {str(number) for number in range(1, 12)} and len(kinds) >= 55
