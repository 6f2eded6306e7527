import pandas as pd
import pytest

from studies.common.claims import Claim, check, laid_out

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
        "holds", "holds", "FAILS", "FAILS", "FAILS", "open", "not refuted", "not refuted",
    ]  # fmt: skip
    assert table["found"].tolist() == ["better"] * 4 + ["worse"] + ["open"] * 3
    assert table["difference"][0].startswith("+0.297 [") and set(table["seeds"]) == {3}


def test_a_table_for_the_eye_says_a_claim_once():
    claims = [Claim("ahead", "new", "old", m) for m in ("accuracy", "fd")]
    table = laid_out(check(ROWS, claims))
    assert table.index.nlevels == 3 and list(table) == ["outcome", "difference", "expected"]
    assert table.to_html().count("ahead") == 1


def test_what_is_not_there_is_left_out_and_expectations_are_checked():
    absent = [Claim("a", "new", "older", "accuracy"), Claim("b", "new", "old", "unseen")]
    assert check(ROWS, absent).empty and laid_out(check(ROWS, absent)).empty
    with pytest.raises(ValueError, match="better, worse, not worse, open"):
        Claim("", "new", "old", "accuracy", "nicer")
