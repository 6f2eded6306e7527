import papermill
import pytest

from studies.common.budgets import refuse_unknown, settle
from tools import book

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


OWN = 'budget: str = "quick"  # how long\nsteps: int = None  # how many\n'


def test_a_name_that_papermill_gives_must_be_one_of_the_notebooks():
    refuse_unknown(["", OWN, "# Parameters\nsteps = 3\n", "import kdc"])
    refuse_unknown(["", OWN, "stepz = 3\n"])  # what a reader types is the reader's
    with pytest.raises(ValueError, match="no parameter stepz; did you mean steps.*budget, steps"):
        refuse_unknown(["", OWN, "# Parameters\nstepz = 3\n"])
    with pytest.raises(ValueError, match="no parameter colour; it has"):
        refuse_unknown(["", OWN, "# Parameters\nsteps = 3\ncolour = 1\n"])


@pytest.mark.long
def test_papermill_alone_refuses_a_misspelt_parameter(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean seeds"):
        papermill.execute_notebook(
            str(book.NOTEBOOKS / "00_quickstart.ipynb"), str(tmp_path / "out.ipynb"),
            parameters={"seedz": [1], "output_dir": str(tmp_path)}, cwd=str(book.NOTEBOOKS),
            kernel_name="python3", progress_bar=False,
        )  # fmt: skip
