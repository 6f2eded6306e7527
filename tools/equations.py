"""The index of numbered equations: which chapter states each, and which code computes it."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import nbformat
import yaml

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TABLE = NOTEBOOKS / "equations.yml"
PAGE = NOTEBOOKS / "equations.md"
NUMBER = re.compile(r"\\tag\{([^}]+)\}")
HEAD = """# Equations, and their code

Each numbered equation of the book, the chapter that derives it in plain code, and the function or
class of the library that computes it. Chapters show that both agree.

| equation | what | chapter | code |
|---|---|---|---|
"""


def numbered() -> dict[str, str]:
    """The name of the chapter of each numbered equation, in the order of the pages.

    Raises `ValueError` for a number that is given twice.
    """
    found: dict[str, str] = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type != "markdown":
                continue
            for number in NUMBER.findall(cell.source):
                if number in found:
                    raise ValueError(f"equation {number} is in {found[number]} and in {path.stem}")
                found[number] = path.stem
    return found


def page() -> str:
    """The index as a page. Raises as `numbered`, and for a table that names other equations."""
    table, chapters = yaml.safe_load(TABLE.read_text("utf-8")), numbered()
    if apart := set(table) ^ set(chapters):
        raise ValueError(f"only in {TABLE.name} or only in the chapters: {sorted(apart)}")
    lines = []
    for number, chapter in chapters.items():
        what, code = table[number]
        link = f"[{chapter.partition('_')[0]}]({chapter}.ipynb)"
        lines.append(f"| ({number}) | {what} | {link} | [`{code}`]({source_of(code)}) |\n")
    return HEAD + "".join(lines)


def source_of(code: str) -> str:
    """The file in which a dotted name is defined, from the notebooks' folder.

    Raises `AttributeError` or `ImportError` for a name that there is not.
    """
    pkgutil.resolve_name(code)
    parts, root = code.split("."), NOTEBOOKS.parent
    while not (root.joinpath(*parts).with_suffix(".py")).is_file():
        parts.pop()
    return "../" + "/".join(parts) + ".py"


def write() -> None:
    """Write the page where it has changed."""
    text = page()
    if not PAGE.is_file() or PAGE.read_text("utf-8") != text:
        PAGE.write_text(text, "utf-8")
