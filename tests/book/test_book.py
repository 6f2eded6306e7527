"""The book builds strictly and works offline; package lists agree; the repository is tidy."""

from __future__ import annotations

import re
import subprocess
import tomllib
from html import unescape
from html.parser import HTMLParser
from importlib.metadata import metadata
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tools import book

ROOT = book.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTERNAL = re.compile(r"^\s*(https?:)?//")
MAX_BYTES = 40 * 2**20
PICKLED = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


class Sources(HTMLParser):
    """What a page fetches by itself (not where its links lead), and its inline scripts."""

    def __init__(self, page: Path):
        super().__init__()
        self.fetched, self.images, self.scripts, self.tag = [], [], "", ""
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tag, attrs = tag, dict(attrs)
        found = [attrs.get(key) for key in ("src", "srcset", "data", "poster") if attrs.get(key)]
        found += [attrs["href"]] if tag == "link" and "href" in attrs else []
        self.fetched += found
        self.images += found if tag == "img" else []

    def handle_endtag(self, tag):
        self.tag = ""

    def handle_data(self, data):
        self.scripts += data if self.tag == "script" else ""


def chapters() -> list[str]:
    return [f"notebooks/{path.stem}.html" for path in book.notebooks()]


@pytest.mark.book
def test_the_book_has_its_pages_with_images(html):
    assert (html / ".nojekyll").is_file(), "a pages server would leave out _static and _images"
    assert (html / "index.html").is_file() and (html / "README.html").is_file()
    for name in chapters():
        images = Sources(html / name).images
        assert any("_images/" in image for image in images), f"{name} shows no image"
        for image in images:
            local = (html / name).parent / image
            assert image.startswith("data:") or local.is_file(), f"{name} lacks {image}"


@pytest.mark.book
def test_every_figure_that_was_shown_is_on_its_page_with_its_number_and_description(html):
    words = yaml.safe_load(book.CAPTIONS.read_text())
    for path in book.notebooks():
        shown = [
            output.metadata[book.FIGURE]["figure"]
            for cell in nbformat.read(book.EXECUTED / path.name, as_version=4).cells
            for output in cell.get("outputs", [])
            if isinstance(output.get("metadata", {}).get(book.FIGURE), dict)
        ]
        page = (html / f"notebooks/{path.stem}.html").read_text("utf-8")
        captions = re.findall(r"<figcaption>.*?<strong>Figure ([\w.]+)\.</strong>", page, re.S)
        assert captions == shown and shown, path.name
        described = re.findall(r'<img alt="([^"]+)"', page)
        assert [unescape(text) for text in described] == [words[n]["alt"] for n in shown], path.name


@pytest.mark.book
def test_the_pages_need_no_network(html):
    pages = sorted(html.rglob("*.html"))
    assert len(pages) > len(chapters())
    for page in pages:
        sources = Sources(page)
        away = [s for s in sources.fetched if EXTERNAL.match(s)]
        assert not away, f"{page.name} fetches {away}"
        assert "://" not in sources.scripts, f"{page.name} has a script that names a host"
    for sheet in html.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text("utf-8")), (
            f"{sheet.name} fetches from the network"
        )


@pytest.mark.book
def test_the_pages_bring_their_own_mathjax(html):
    assert (html / "_static" / "mathjax" / "tex-chtml.js").is_file()
    assert list((html / "_static" / "mathjax").rglob("*.woff"))
    with_maths = [p for p in html.rglob("*.html") if 'class="math' in p.read_text("utf-8")]
    assert with_maths, "no page has an equation"
    for page in with_maths:
        assert any(s.endswith("/mathjax/tex-chtml.js") for s in Sources(page).fetched), page.name


@pytest.mark.book
def test_the_pages_name_no_folder_of_the_machine_that_built_them(html):
    for page in html.rglob("*.html"):
        assert str(ROOT) not in page.read_text("utf-8"), page.name


def test_a_published_book_knows_its_source_and_its_address(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "STAGE", tmp_path)
    own = (ROOT / "_config.yml").read_text()
    (tmp_path / "_config.yml").write_text(own)
    book.publish("https://github.com/reader/kdc/", "https://example.org/kdc")
    config = yaml.safe_load((tmp_path / "_config.yml").read_text())
    assert config["repository"]["url"] == "https://github.com/reader/kdc"
    assert config["html"]["use_repository_button"] and config["html"]["use_issues_button"]
    assert {"binderhub_url", "colab_url"} < set(config["launch_buttons"])
    assert config["sphinx"]["config"]["ogp_site_url"] == "https://example.org/kdc/"
    assert "binderhub_url" not in own, "a book built here has no buttons that need the network"
    workflow = (ROOT / ".github" / "workflows" / "pages.yml").read_text()
    assert re.search(r"make book REPOSITORY=.* ADDRESS=", workflow)


@pytest.fixture
def two_notebooks(tmp_path, monkeypatch):
    """A folder with a notebook that fails and one that draws nothing but runs."""
    for name in ("NOTEBOOKS", "EXECUTED", "OUTPUTS"):
        monkeypatch.setattr(book, name, tmp_path / name.lower())
    book.NOTEBOOKS.mkdir()
    cell = nbformat.v4.new_code_cell(
        'budget: str = "quick"  # how long\noutput_dir: str = "."  # where',
        metadata={"tags": ["parameters"]},
    )
    for name, code in (("00_fails", "1 / 0"), ("01_runs", "print(budget)")):
        cells = [cell, nbformat.v4.new_code_cell(code)]
        metadata = {"kernelspec": {"name": "python3", "display_name": "-", "language": "python"}}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
        nbformat.write(notebook, book.NOTEBOOKS / f"{name}.ipynb")


def test_an_unknown_parameter_is_refused_before_anything_runs(two_notebooks):
    with pytest.raises(book.BookError, match="00_fails.ipynb has no parameter stepz"):
        book.run(stepz=3)
    assert not book.EXECUTED.exists()


def test_a_misspelt_parameter_is_told_its_nearest(two_notebooks):
    with pytest.raises(book.BookError, match="did you mean budget"):
        book.run(bugdet="quick")


def test_paths_mean_the_folder_in_which_they_were_typed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "roses").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"dataset": "roses then flora", "teacher": "mini", "output_dir": "~/out", "steps": 3}
    assert book.from_here(given) == {
        "dataset": f"{tmp_path / 'roses'} then flora",
        "teacher": "mini",
        "output_dir": str(tmp_path / "home" / "out"),
        "steps": 3,
    }
    assert book.from_here({"output_dir": "out"}) == {"output_dir": str(tmp_path / "out")}
    assert not (tmp_path / "out").exists() and not (tmp_path / "~").exists()
    with pytest.raises(book.BookError, match="dataset must be a text, not 102"):
        book.from_here({"dataset": 102})


def test_a_value_that_is_no_yaml_is_one_line(capsys):
    with pytest.raises(SystemExit, match="-p seeds '\\[0, 1' is no YAML"):
        book.main(["run", "--only", "A3", "-p", "seeds", "[0, 1"])


@pytest.mark.parametrize(
    "text, bar",
    [
        ("  5%|5         | 1/20 [00:01<00:19,  1.00s/it]", True),
        ("renderings: 0it [00:00, ?it/s]", True),
        ("without down attention 0, down attention 1, layer 2, mid-block, stage 3:   0…", True),
        ("IntSlider(value=7, description='steps')", False),
        ("interactive(children=(Dropdown(description='plan'), Output()))", False),
    ],
)
def test_a_control_leaves_a_note_and_a_progress_bar_nothing(text, bar):
    output = nbformat.v4.new_output("display_data", {book.WIDGET: {}, "text/plain": text})
    cell = nbformat.v4.new_code_cell("x", outputs=[output])
    cleaned = book.clean(nbformat.v4.new_notebook(cells=[cell])).cells[0].outputs
    notes = [each.data["text/markdown"] for each in cleaned]
    assert notes == ([] if bar else [book.WIDGET_NOTE])


@pytest.mark.book
def test_a_failure_is_named_and_the_other_notebooks_still_run(two_notebooks, capsys):
    with pytest.raises(book.BookError, match="1 of 2 notebooks failed: 00_fails.ipynb"):
        book.run()
    assert "ZeroDivisionError" in capsys.readouterr().err
    ran = book.read_executed("01_runs.ipynb", book.EXECUTED)
    assert ran.cells[-1].outputs[0].text == "quick\n"
    book.keep("01")
    kept = nbformat.read(book.NOTEBOOKS / "01_runs.ipynb", as_version=4)
    assert kept.cells[-1].outputs == ran.cells[-1].outputs
    assert len(kept.cells) == 2 and set(kept.metadata) == {"kernelspec"}
    ran.cells[-1].execution_count = None  # as papermill leaves it where a run is killed before it
    nbformat.write(ran, book.EXECUTED / "01_runs.ipynb")
    with pytest.raises(book.BookError, match="01_runs.ipynb was stopped half-way: run it again"):
        book.keep("01")
    assert nbformat.read(book.NOTEBOOKS / "01_runs.ipynb", as_version=4) == kept


def pins() -> dict[str, str]:
    found = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), f"not a plain pin: {line}"
        name, _, pinned = line.partition("==")
        found[canonicalize_name(name)] = pinned
    return found


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"book", "test", "photos", "onnx", "logs"}
    every = [*PROJECT["dependencies"], *(r for extra in extras.values() for r in extra)]
    assert "kdc[photos,onnx,logs]" in extras["test"], "the tests need them all"
    return [Requirement(r) for r in every if not r.startswith("kdc[")]


def test_the_lock_meets_every_requirement():
    locked = pins()
    for requirement in requirements():
        pinned = locked.get(canonicalize_name(requirement.name))
        assert pinned, f"{requirement.name} is not in the lock: make lock"
        assert requirement.specifier.contains(pinned), f"{requirement} but the lock has {pinned}"


def test_the_lock_suits_the_oldest_python():
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    for name in pins():
        wanted = metadata(name).get("Requires-Python") or ">=3"
        assert SpecifierSet(wanted).contains(oldest), f"{name} needs Python {wanted}"


def test_the_lock_leaves_linux_packages_to_torch():
    lock = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"^(nvidia|cuda|triton)", lock, flags=re.MULTILINE)


def test_jupyter_book_stays_below_2():
    (pin,) = [r for r in requirements() if r.name == "jupyter-book"]
    assert not pin.specifier.contains("2.0.0")


def test_the_conda_environment_installs_this_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert f"python{PROJECT['requires-python']}" in conda and "pip" in conda
    assert pip == {"pip": ["-r requirements.lock", "-e .[book,test]"]}


def test_the_repository_has_no_pickled_weights_and_no_huge_file():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    tracked = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert ROOT / "pyproject.toml" in tracked
    for path in tracked:
        assert path.suffix not in PICKLED, f"{path.name}: weights are safetensors"
        assert not path.is_file() or path.stat().st_size <= MAX_BYTES, f"{path.name} is too large"
