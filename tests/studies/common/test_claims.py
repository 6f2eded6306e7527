import pandas as pd
import pytest

from studies.common.claims import Claim, check, one_family, survivors

ROWS = pd.DataFrame(
    {
        "candidate": ["new"] * 3 + ["old"] * 3,
        "seed": [0, 1, 2] * 2,
        "accuracy": [0.8, 0.82, 0.81, 0.5, 0.51, 0.53],
        "fd": [5.0, 9.0, 7.0, 7.0, 6.0, 8.0],
    }
)


def test_a_claim_holds_fails_or_stays_open():
    claims = [
        Claim("better", "new", "old", "accuracy"),
        Claim("not worse", "new", "old", "accuracy", "not worse"),
        Claim("no difference", "new", "old", "accuracy", "open"),
        Claim("worse", "new", "old", "accuracy", "worse"),
        Claim("backwards", "old", "new", "accuracy", "not worse"),
        Claim("cannot be told", "new", "old", "fd"),
        Claim("and is not", "new", "old", "fd", "open"),
        Claim("nor worse", "new", "old", "fd", "not worse"),
    ]
    table = check(ROWS, claims)
    assert table["outcome"].tolist() == [
        "holds", "holds", "refuted", "refuted", "refuted", "open", "open", "open",
    ]  # fmt: skip
    assert table["found"].tolist() == ["better"] * 4 + ["worse"] + ["open"] * 3
    assert table["mean"][0] == pytest.approx(0.2967, abs=1e-4) and set(table["seeds"]) == {3}


def test_p_values_are_adjusted_for_the_whole_family():
    """One clear difference is significant by itself and among two, and not among sixty."""
    ahead, even = (Claim("ahead", "new", "old", m) for m in ("accuracy", "fd"))
    two = check(ROWS, [ahead, even])
    alone = two["p"][0]
    assert two["adjusted"].tolist() == pytest.approx([2 * alone, two["p"][1]])
    many = one_family([two] * 30)
    assert many["adjusted"].min() == pytest.approx(min(1, 60 * alone))
    assert "(p < 0.05): 1 of 2 differences by themselves, 1 among all" in survivors(two)
    assert "30 of 60 differences by themselves, 0 among all" in survivors(many)


def test_what_is_not_there_is_left_out_and_expectations_are_checked():
    absent = [Claim("a", "new", "older", "accuracy"), Claim("b", "new", "old", "unseen")]
    assert check(ROWS, absent).empty
    with pytest.raises(ValueError, match="better, worse, not worse, open"):
        Claim("", "new", "old", "accuracy", "nicer")
