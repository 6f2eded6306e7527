"""Finds misspelt and American words in the prose: pages, comments, docstrings. By codespell.

`python tools/spelling.py [FILE ...]`; without files, all that git knows. Exit code 1 for findings.
"""

from __future__ import annotations

import ast
import importlib.resources
import io
import re
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_PROSE = re.compile(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|https?://\S+|<[^>]*>|\{[^}]*\}")
FENCED = re.compile(r"^(```|~~~).*?^\1[^\S\n]*$", re.M | re.S)
# American by codespell's list, and right in British English too.
ALSO_BRITISH = {"program"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
AS_IT_IS = ("notebooks/references.bib",)  # titles of works


def blank(match: re.Match) -> str:
    """As many lines, with nothing in them."""
    return "\n" * match.group().count("\n")


def prose_of(file: Path) -> str:
    """What of a file is prose, at the lines where it stands."""
    text = file.read_text("utf-8")
    if file.suffix == ".py":
        lines, prose = text.split("\n"), [""] * (text.count("\n") + 1)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                prose[token.start[0] - 1] = token.string
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                first, last = node.body[0].lineno - 1, node.body[0].end_lineno
                prose[first:last] = lines[first:last]
        text = "\n".join(prose)
    text = FENCED.sub(blank, text)
    return NOT_PROSE.sub(lambda match: " " + blank(match), text)


def to_british() -> str:
    """A dictionary of codespell's kind, from American words to British ones."""
    data = importlib.resources.files("codespell_lib") / "data" / "dictionary_en-GB_to_en-US.txt"
    pairs = (line.split("->") for line in data.read_text("utf-8").splitlines() if "->" in line)
    found = {american.strip(", "): british.strip() for british, american in pairs}
    return "".join(f"{a}->{b}\n" for a, b in found.items() if a not in ALSO_BRITISH)


def findings(files: list[Path]) -> list[str]:
    """A line for each word that is misspelt or American: file, line, word, and what to write."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "british.txt").write_text(to_british(), "utf-8")
        for file in files:
            copy = folder / "prose" / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(prose_of(file), "utf-8")
        command = [
            sys.executable,
            "-m",
            "codespell_lib",
            "-D",
            str(folder / "british.txt"),
            "-D",
            "-",
        ]
        done = subprocess.run([*command, "prose"], cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 65):
        raise RuntimeError(done.stderr)
    return [line.removeprefix("prose/") for line in done.stdout.splitlines()]


def known_files() -> list[Path]:
    """The pages and the Python files that git knows."""
    names = subprocess.run(
        ["git", "ls-files", "*.md", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [ROOT / name for name in names if name not in AS_IT_IS]


def main(names: list[str]) -> None:
    found = findings([Path(name).resolve() for name in names] or known_files())
    print("\n".join(found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
