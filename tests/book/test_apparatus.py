"""Bibliography, glossary and citation are complete and agree with what the book says."""

import re

import pytest
import yaml

import kdc
from kdc.distillation.losses import TERMS
from tools import book, diagram

REFERENCES = (book.NOTEBOOKS / "references.bib").read_text()
# "arXiv 2305.15798", "(Hang et al. 2303.09556, ...", "arxiv.org/abs/2412.01199"
ARXIV = re.compile(r"(?:arXiv[: ]|abs/|et al\.,?[\s#]+)(\d{4}\.\d{4,5})\b")


def entries():
    """Each entry of the bibliography: its key, and its fields."""
    found = {}
    for key, body in re.findall(r"@\w+\{(\w+),\n(.*?)\n\}", REFERENCES, re.S):
        found[key] = dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.M))
    return found


def test_every_entry_has_what_it_takes_to_find_the_work():
    assert len(entries()) == REFERENCES.count("\n@") + 1 >= 40
    for key, fields in entries().items():
        assert {"author", "title", "year"} <= fields.keys(), key
        assert fields.keys() & {"eprint", "booktitle", "journal"}, key
        assert re.fullmatch(r"[a-z]+" + fields["year"] + r"[a-z]*", key), key
    prints = [fields["eprint"] for fields in entries().values() if "eprint" in fields]
    assert len(set(prints)) == len(prints)
    years = [(fields["eprint"][:2], fields["year"][2:]) for fields in entries().values()
             if "eprint" in fields]  # fmt: skip
    assert all(0 <= int(year) - int(written) <= 2 for written, year in years)


def test_every_paper_that_is_named_stands_in_the_bibliography():
    known = {fields.get("eprint") for fields in entries().values()}
    files = [*book.NOTEBOOKS.glob("*.py"), book.ROOT / "README.md"]
    files += [f for folder in ("kdc", "studies") for f in (book.ROOT / folder).rglob("*.py")]
    named = {(number, f.name) for f in files for number in ARXIV.findall(f.read_text())}
    assert len({number for number, _ in named}) >= 15
    assert not sorted((number, name) for number, name in named if number not in known)


def test_the_glossary_is_in_order_and_names_chapters_that_exist():
    text = (book.NOTEBOOKS / "glossary.md").read_text()
    terms = re.findall(r"^\*\*(.+?)\.\*\* ", text, re.M)
    assert len(terms) > 30 and [t.lower() for t in terms] == sorted(t.lower() for t in terms)
    links = re.findall(r"\]\((\w+\.ipynb)\)", text)
    assert links and all((book.NOTEBOOKS / link).is_file() for link in links)


@pytest.mark.parametrize("needed", ["title", "authors", "message", "license", "references"])
def test_the_citation_file_is_complete(needed):
    assert yaml.safe_load((book.ROOT / "CITATION.cff").read_text())[needed]


def test_the_reference_shows_every_public_name_once():
    text = (book.NOTEBOOKS / "reference.md").read_text()
    shown = re.findall(r"^\.\. auto\w+:: kdc\.(\w+)$", text, re.M)
    shown += re.findall(r"^`kdc\.(\w+)` is ", text, re.M)
    assert sorted(shown) == sorted(kdc.__all__)


def test_the_map_of_the_method_is_as_the_code_draws_it(tmp_path, monkeypatch):
    numbers = {name.partition("_")[0] for name in (path.stem for path in book.notebooks())}
    assert {box[5] for box in diagram.BOXES.values()} <= numbers
    assert {box[5] for box in diagram.BOXES.values()} >= {"01", "02", "04", "05", "06", "07"}
    assert {name for arrow in diagram.ARROWS for name in arrow[:2]} == set(diagram.BOXES)
    assert all(term in diagram.BOXES["terms"][4] for term in TERMS)
    stored = diagram.FILE.read_bytes()
    monkeypatch.setattr(diagram, "FILE", tmp_path / "method.svg")
    diagram.main()
    assert diagram.FILE.read_bytes() == stored
