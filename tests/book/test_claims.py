"""The page of claims, the chapters and what is stored say the same."""

import re

import nbformat
import pytest

from studies.common.claims import survivors
from tools import book, claims


def test_the_page_of_claims_is_that_of_the_stored_results():
    assert claims.PAGE.read_text() == claims.page(), "run `python tools/book.py tidy`"
    lines = [line for line in claims.page().splitlines() if line.startswith("| ")]
    count = sum(len(claims.family(chapter)) for chapter in claims.FAMILIES)
    heads = sum(line.startswith(("| claim |", "| goal |")) for line in lines)
    goals = sum(line.endswith(("| surely |", "| on the mean |", "| missed |")) for line in lines)
    assert goals == 5 and len(lines) - heads - goals == count > 80


@pytest.mark.parametrize("chapter", list(claims.FAMILIES))
def test_a_chapter_counts_its_claims_as_the_page_does(chapter):
    """What it prints of the family's differences, in its committed outputs."""
    notebook = nbformat.read(book.NOTEBOOKS / f"{chapter}.ipynb", as_version=4)
    texts = [o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", [])]
    printed = [text for text in texts if text.startswith("significant (p < ")]
    found = [line for text in printed for line in text.splitlines() if line.startswith("signif")]
    assert found == [survivors(claims.family(chapter))]


def test_an_outcome_that_does_not_survive_is_in_italics():
    row = {
        "claim": "c", "candidate": "a", "baseline": "b", "measure": "fd", "mean": 1.0, "low": 0.5,
        "high": 1.5, "adjusted": 0.2, "outcome": "holds",
    }  # fmt: skip
    assert claims._line(row).endswith("| .200 | *✓ holds* |\n")
    assert claims._line(row | {"adjusted": 0.0004}).endswith("| < .001 | ✓ holds |\n")
    assert claims._line(row | {"outcome": "open"}).endswith("| ? open |\n")
    assert re.search(r"a − b, fd \| \+1 \[\+0.5, \+1.5\]", claims._line(row))
