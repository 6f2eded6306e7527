"""The folder tree is the architecture: which package may import from which, as a table."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each package or module, and what it may import from beside itself. Nothing else is allowed.
ALLOWED = {
    "kdc.paths": "",
    "kdc.checks": "",
    "kdc.processes": "",
    "kdc.io": "",
    "kdc.unet": "checks",
    "kdc.pipelines": "paths checks processes io unet",
    "kdc.data": "paths checks processes io pipelines",
    "kdc.training": "paths checks processes io",
    "kdc.distillation": "paths checks processes io unet pipelines data training",
    "kdc.replay": "paths checks processes io data",
    "kdc.continual": "paths checks processes io unet pipelines data training distillation replay",
    "kdc.evaluation": "paths checks processes io unet pipelines data distillation",
    "kdc.search": "unet data distillation",
    "kdc.handover": "paths checks io unet pipelines",
}
ABOVE = {"kdc.commands"}  # the command line uses all of the library, and nothing imports it
STUDIES = {
    "studies.figures": "",
    "studies.common": "",
    "studies.mini": "common figures",
    "studies.slimming": "common figures",
    "studies.distillation": "common figures",
    "studies.replay": "common figures",
    "studies.evaluation": "common figures distillation slimming",
    "studies.metrics": "common figures",
    "studies.full_scale": "common",
}


def files_of(package):
    place = ROOT / package.replace(".", "/")
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def imported(file):
    """The packages, two names deep, that a file imports from: `kdc.unet`, `studies.common`, ..."""
    for node in ast.walk(ast.parse(file.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if node.module in ("kdc", "studies"):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        yield from (".".join(m.split(".")[:2]) for m in modules)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_the_table_allows(package):
    allowed = {package} | {f"kdc.{name}" for name in ALLOWED[package].split()}
    for file in files_of(package):
        found = {name for name in imported(file) if name.split(".")[0] in ("kdc", "studies")}
        assert found <= allowed, f"{file.relative_to(ROOT)} imports {sorted(found - allowed)}"


@pytest.mark.parametrize("package", STUDIES)
def test_a_study_imports_the_library_and_what_the_table_allows(package):
    allowed = {package} | {f"studies.{name}" for name in STUDIES[package].split()}
    for file in files_of(package):
        found = {name for name in imported(file) if name.startswith("studies")}
        assert found <= allowed, f"{file.relative_to(ROOT)} imports {sorted(found - allowed)}"


@pytest.mark.parametrize(("table", "root"), [(ALLOWED, "kdc"), (STUDIES, "studies")])
def test_the_tables_name_every_package(table, root):
    there = {
        f"{root}.{path.stem}"
        for path in (ROOT / root).iterdir()
        if not path.name.startswith(("_", ".")) and path.name != "assets"
        and (path.suffix == ".py" or any(path.glob("*.py")))
    }  # fmt: skip
    assert there - ABOVE == set(table)


def test_the_tests_mirror_the_packages():
    for root in ("kdc", "studies"):
        for folder in (ROOT / root).iterdir():
            if any(folder.glob("*.py")) and folder.name != "__pycache__":
                assert any((ROOT / "tests" / root / folder.name).glob("test_*.py")), folder.name
