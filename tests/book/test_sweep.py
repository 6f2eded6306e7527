"""The sweep that the preface shows: its code runs, and its parameters are the chapter's."""

import re

import papermill
import pytest

from tools import book

TEXT = (book.NOTEBOOKS / "preface.md").read_text()
CODE = re.search(r"```python\n(import json\n.*?)```", TEXT, re.DOTALL)[1]


def test_the_sweep_gives_parameters_that_the_chapter_has():
    given = set(re.findall(r'^ +"(\w+)": ', CODE, re.MULTILINE))
    chapter = book.NOTEBOOKS / "02_distillation_terms.ipynb"
    assert given == {"plan", "seeds", "steps", "output_dir"}
    assert given <= set(papermill.inspect_notebook(str(chapter)))
    assert (book.NOTEBOOKS / "images" / "sweep.png").is_file()


@pytest.mark.slow
def test_the_sweep_runs_and_draws(tmp_path, monkeypatch):
    """One plan, one seed and one update, in a folder that has the notebooks."""
    (tmp_path / "notebooks").symlink_to(book.NOTEBOOKS)
    (tmp_path / "outputs" / "sweep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    short = re.sub("PLANS, SEEDS, STEPS = .*", 'PLANS, SEEDS, STEPS = ("kdc",), (0,), 1', CODE)
    exec(short, {})
    assert (tmp_path / "outputs" / "sweep" / "sweep.png").is_file()
