import pytest

from studies.common.budgets import settle

TABLE = {"quick": {"steps": 5, "seeds": [0]}, "standard": {"steps": 50, "seeds": [0, 1, 2]}}


def test_a_budget_fills_what_was_left_open():
    assert settle("standard", TABLE, steps=None).steps == 50
    assert settle("standard", TABLE, steps=7, seeds=None).steps == 7
    assert settle("quick", TABLE, seeds=[4]).seeds == [4]
    assert TABLE["quick"]["seeds"] == [0]


@pytest.mark.parametrize(
    "budget, given, message",
    [
        ("huge", {}, "quick, standard"),
        ("quick", {"plan": "kdc"}, "plan"),
        ("quick", {"steps": 0}, "steps"),
        ("quick", {"steps": "many"}, "steps"),
        ("quick", {"seeds": []}, "seeds"),
        ("quick", {"seeds": 3}, "seeds"),
        ("quick", {"seeds": "[7]"}, "papermill takes one as -y"),
        ("quick", {"seeds": ["0"]}, "seeds"),
        ("quick", {"seeds": [0.5]}, "seeds"),
        ("quick", {"steps": True}, "steps"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(budget, given, message):
    with pytest.raises(ValueError, match=message):
        settle(budget, TABLE, **given)
