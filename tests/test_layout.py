"""The library stands as the README's layout says: a module imports only from below or its left."""

import ast
import re
from pathlib import Path

import kdc

ROOT = Path(kdc.__file__).parent


def floors():
    """The modules in the README's order, those of one floor in one list."""
    readme = (ROOT.parent / "README.md").read_text()
    text = re.search(r"from its left:\n(.*?)\n +mini \(", readme, re.DOTALL).group(1)
    joined = re.sub(r",\s*\n\s*", ", ", text)  # a floor goes on where its line ends in a comma
    return [line.strip().split(", ") for line in joined.splitlines()]


def imported(file):
    """The modules of `kdc` that a file imports from."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "kdc":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdc."):
            yield node.module.split(".")[1]


def test_the_readme_names_every_module():
    there = {p.stem for p in ROOT.glob("[!_]*.py")} | {p.parent.name for p in ROOT.glob("*/*.py")}
    assert sorted(sum(floors(), [])) == sorted(there - {"mini", "studies", "assets"})


def test_a_module_imports_only_from_before_itself():
    order = {name: at for at, name in enumerate(sum(floors(), []))}
    for name, at in order.items():
        for file in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py")]:
            for other in set(imported(file)) - {name}:
                assert order.get(other, len(order)) < at, f"{file.name} imports from {other}"
