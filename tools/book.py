"""Runs the notebooks and builds the book from what they drew.

run    every notebook with papermill, into build/notebooks/; at the quick budget unless told
tidy   bring the two halves of each notebook in line (the newer one wins), format, drop noise
keep   copy the outputs of the last run into notebooks/, for committing
build  the HTML book from build/notebooks/; `--source notebooks` takes the committed outputs
all    run, then build

For example: `python tools/book.py run --only 01 -p budget standard -p seeds "[0, 1, 2]"`
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import yaml

from studies.common.budgets import unknown_names
from tools import claims, equations

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
EXECUTED = ROOT / "build" / "notebooks"
OUTPUTS = ROOT / "build" / "outputs"
STAGE = ROOT / "build" / "book"
INDEX = STAGE / "_build" / "html" / "index.html"

WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGET_NOTE = "*In JupyterLab an interactive control stands here.*"
# A control's text is how it was made, "VBox(...)"; a progress bar's is its line, cut short.
CONTROL = re.compile(r"\w+\(")
# As a kernel says it, less its version: without it JupyterLab takes a notebook for changed.
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
CAPTIONS = NOTEBOOKS / "captions.yml"
FIGURE = "kdc"  # the metadata of `studies.figures.show`
# What of a notebook its text half holds, as in pyproject.toml. Where a notebook says otherwise, it
# opens with an error in a fresh clone, in which either half may be the newer.
PAIRED = {"cell_metadata_filter": "tags,-all", "notebook_metadata_filter": "kernelspec,-all"}
PATHS = ("dataset", "teacher", "output_dir")  # parameters that may name a file or folder
MAP = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<file>notebooks/images/method\.svg)\)")
LINK = re.compile(r"\]\(<?([^)\s>#]+)|\bsrc=[\"']([^\"'#]+)")


class BookError(Exception):
    """Something the reader of the message can put right; shown without a traceback."""


def notebooks(only: str | None = None) -> list[Path]:
    """The notebooks in reading order, or those whose name starts with `only`."""
    found = sorted(NOTEBOOKS.glob(f"{only or ''}*.ipynb"))
    if not found:
        raise BookError(f"no notebook named {only or ''}*.ipynb in {NOTEBOOKS}")
    return found


def check_parameters(notebook: Path, names) -> None:
    """Refuse names that the notebook does not have: papermill would only warn and run on."""
    known = set(papermill.inspect_notebook(str(notebook)))
    if message := unknown_names(notebook.name, set(names), known):
        raise BookError(message)


def run_one(notebook: Path, **parameters) -> Path:
    """Run a notebook from its own folder, as JupyterLab would; returns the executed copy."""
    defaults = {"budget": "quick", "output_dir": str(OUTPUTS / notebook.stem)}
    parameters = defaults | parameters
    check_parameters(notebook, parameters)
    executed = EXECUTED / notebook.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    executed.unlink(missing_ok=True)
    if parameters == defaults:  # minutes: what an earlier version left there is made again
        shutil.rmtree(OUTPUTS / notebook.stem, ignore_errors=True)
    papermill.execute_notebook(
        str(notebook),
        str(executed),
        parameters=parameters,
        kernel_name="python3",
        language="python",
        cwd=str(NOTEBOOKS),
        progress_bar=False,
    )
    return executed


def from_here(parameters: dict) -> dict:
    """Parameters whose paths mean the folder in which they were typed, and `~` the home folder.

    A notebook runs in its own folder. Names that are no paths here, such as "mini", stay.
    """
    found = dict(parameters)
    for name in set(PATHS) & set(parameters):
        if not isinstance(parameters[name], str):
            raise BookError(
                f"{name} must be a text, not {parameters[name]!r}: put it in quotes twice, as in"
                f" -p {name} '\"{parameters[name]}\"'"
            )
        parts = parameters[name].split(" then ")
        paths = [Path(part).expanduser() for part in parts]
        found[name] = " then ".join(
            str(path.absolute()) if name == "output_dir" or path.exists() else part
            for part, path in zip(parts, paths, strict=True)
        )
    return found


def run(only: str | None = None, **parameters) -> None:
    """Run the notebooks one after the other; a failure does not keep the others from running."""
    chosen, parameters = notebooks(only), from_here(parameters)
    for notebook in chosen:
        check_parameters(notebook, {"budget", "output_dir", *parameters})
    failed = []
    for notebook in chosen:
        start = time.perf_counter()
        try:
            run_one(notebook, **parameters)
            verdict = "ok"
        except Exception as error:  # whatever a notebook raises, name it and go on
            verdict = "FAILED"
            failed.append(notebook.name)
            print(f"{notebook.name}: {error}", file=sys.stderr)
        print(f"{verdict:>6}  {time.perf_counter() - start:6.1f} s  {notebook.name}", flush=True)
    if failed:
        raise BookError(f"{len(failed)} of {len(chosen)} notebooks failed: {', '.join(failed)}")


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out what one run leaves behind: injected parameters, timestamps, paths, live widgets.

    A widget needs scripts from the network to come alive on a page, so a note takes its place;
    a progress bar has nothing left to say and goes without one.
    """
    notebook.metadata = {k: v for k, v in notebook.metadata.items() if k == "kernelspec"}
    notebook.metadata |= {"language_info": LANGUAGE, "jupytext": PAIRED}
    notebook.cells = [
        c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])
    ]
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        if cell.cell_type != "code":
            continue
        outputs = []
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):
                if not CONTROL.match(output.data.get("text/plain", "")):
                    continue
                data = {"text/markdown": WIDGET_NOTE, "text/plain": WIDGET_NOTE.strip("*")}
                output = nbformat.v4.new_output("display_data", data)
            outputs.append(output)
        cell.outputs = outputs
        recaption(outputs)
    return notebook


def recaption(outputs: list) -> None:
    """Give figures the present words of `CAPTIONS`; the run that drew them may be older."""
    words, number = yaml.safe_load(CAPTIONS.read_text("utf-8")), None
    for output in outputs:
        note = output.get("metadata", {}).get(FIGURE)
        if note == "caption":
            output.data["text/markdown"] = f"**Figure {number}.** {words[number]['caption']}"
        elif note:
            number = note["figure"]
            note |= words[number]
            output.data["text/plain"] = note["alt"]


def tidy() -> None:
    """Sync each .ipynb with its .py, clean and format it; the .py and the indexes follow."""
    jupytext = [sys.executable, "-m", "jupytext", "--quiet", "--sync"]
    subprocess.run([*jupytext, *NOTEBOOKS.glob("*.py"), *NOTEBOOKS.glob("*.ipynb")], check=True)
    for path in notebooks():
        nbformat.write(clean(nbformat.read(path, as_version=4)), path)
    subprocess.run([sys.executable, "-m", "ruff", "format", *notebooks()], check=True)
    subprocess.run([*jupytext, *notebooks()], check=True)
    equations.write()
    claims.write()


def keep(only: str | None = None) -> None:
    """Copy the outputs of the last run into notebooks/; sources and metadata stay as they are."""
    for path in notebooks(only):
        notebook = nbformat.read(path, as_version=4)
        executed = clean(read_executed(path.name, EXECUTED))
        if [c.source for c in notebook.cells] != [c.source for c in executed.cells]:
            raise BookError(f"{path.name} has changed since it was run: run it again")
        for cell, ran in zip(notebook.cells, executed.cells, strict=True):
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
        nbformat.write(notebook, path)
        print(f"kept the outputs of {path.name}")


def read_executed(name: str, folder: Path) -> nbformat.NotebookNode:
    if not (folder / name).is_file():
        raise BookError(f"{name} has not been run: no {folder / name}")
    notebook = nbformat.read(folder / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    if any(cell.execution_count is None for cell in code):  # papermill writes as it goes
        raise BookError(f"{folder / name} was stopped half-way: run it again")
    return notebook


def stage(source: Path = EXECUTED) -> None:
    """Lay out everything the book needs in a folder of its own, so that nothing else gets in."""
    shutil.rmtree(STAGE, ignore_errors=True)
    (STAGE / "notebooks").mkdir(parents=True)
    for name in ("_toc.yml", "_config.yml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, STAGE / name)
    shutil.copytree(NOTEBOOKS / "_static", STAGE / "_static")
    first = STAGE / "README.md"
    first.write_text(MAP.sub(in_the_page, first.read_text("utf-8")), "utf-8")
    copy_linked((ROOT / "README.md").read_text("utf-8"), ROOT)
    shutil.copy(NOTEBOOKS / "references.bib", STAGE / "notebooks")
    for page in NOTEBOOKS.glob("*.md"):
        shutil.copy(page, STAGE / "notebooks" / page.name)
        copy_linked(page.read_text("utf-8"), NOTEBOOKS)
    for path in notebooks():
        notebook = with_figures(clean(read_executed(path.name, source)))
        nbformat.write(notebook, STAGE / "notebooks" / path.name)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                copy_linked(cell.source, NOTEBOOKS)


def with_figures(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Tell the book of each figure that `studies.figures.show` showed: its caption and description.

    In JupyterLab the caption is an output of its own; here it belongs to the figure. The book has
    one caption a cell, for all of its outputs, so a figure gets a cell of its own, without code.
    """
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type != "code":
            continue
        rest, cell.outputs = cell.outputs, []
        for output in rest:
            note = output.get("metadata", {}).get(FIGURE)
            if note == "caption":
                continue
            last = cells[-1]
            if note or "mystnb" in last.metadata:
                # The book leaves out a cell whose source is empty, with its outputs.
                last = nbformat.v4.new_code_cell("...", metadata={"tags": ["remove-input"]})
                cells.append(last)
                last.execution_count = cell.execution_count
            if note:
                last.metadata["mystnb"] = {
                    "image": {"alt": note.alt},
                    "figure": {
                        "caption": f"**Figure {note.figure}.** {note.caption}",
                        "name": f"figure-{note.figure.lower().replace('.', '-')}",
                    },
                }
            last.outputs.append(output)
    notebook.cells = cells
    return notebook


def in_the_page(image: re.Match) -> str:
    """A drawing as part of the page, in which its links work; as a picture they would not."""
    drawing = (ROOT / image["file"]).read_text("utf-8")
    drawing = drawing[drawing.index("<svg") :]
    label = html.escape(" ".join(image["alt"].split()))
    drawing = drawing.replace("<svg", f'<svg role="group" aria-label="{label}"', 1)
    return f'```{{raw}} html\n<div class="map">{drawing}</div>\n```'


def copy_linked(text: str, folder: Path) -> None:
    """Copy the project's files that a page links to or shows; the strict build asks for each."""
    for link in LINK.findall(text):
        path = (folder / "".join(link)).resolve()
        if path.is_file() and path.is_relative_to(ROOT) and path.suffix not in {".ipynb", ".md"}:
            copy = STAGE / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def publish(repository: str | None, address: str | None) -> None:
    """Tell the staged book where its source and its pages lie on the net.

    `repository`, an address such as https://HOST/OWNER/NAME, gives every page links to its source
    and to issues, and buttons that open it on Binder and Colab. `address` is that of the pages.
    """
    path = STAGE / "_config.yml"
    config = yaml.safe_load(path.read_text("utf-8"))
    if repository:
        config["repository"] = {"url": repository.rstrip("/"), "branch": "main"}
        config["html"] |= {"use_repository_button": True, "use_issues_button": True}
        config["launch_buttons"] |= {
            "notebook_interface": "jupyterlab",
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
        }
    if address:
        config["sphinx"]["config"]["ogp_site_url"] = address.rstrip("/") + "/"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), "utf-8")


def finish(pages: Path) -> None:
    """Take out what no page loads, and a role that the bibliography's entries do not fit.

    The former are maps of the theme's sources and its translations.
    """
    for file in (pages / "_static").rglob("*.map"):
        file.unlink()
    shutil.rmtree(pages / "_static" / "locales", ignore_errors=True)
    page = pages / "notebooks" / "bibliography.html"
    page.write_text(page.read_text("utf-8").replace(' role="list"', ""), "utf-8")


def build(
    source: Path = EXECUTED, repository: str | None = None, address: str | None = None
) -> Path:
    """Build the HTML book; any warning fails it. Returns its first page. See `publish`."""
    stage(source)
    if repository or address:
        publish(repository, address)
    command = [Path(sys.executable).with_name("jupyter-book"), "build", STAGE]
    done = subprocess.run([*command, "-W", "-n", "--keep-going"])
    if done.returncode != 0:
        raise BookError("the book has warnings or errors, see above")
    finish(INDEX.parent)
    (INDEX.parent / ".nojekyll").touch()  # else pages servers leave out folders such as _static
    return INDEX


def as_value(name: str, text: str):
    """A parameter's value as YAML gives it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BookError(f"-p {name} {text!r} is no YAML: {error}") from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "tidy", "keep", "build", "all"))
    parser.add_argument("--only", metavar="NAME", help="notebooks whose name starts with NAME")
    parser.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a notebook parameter (VALUE is read as YAML); may be repeated",
    )
    parser.add_argument(
        "--source", type=Path, default=EXECUTED, help="where `build` finds executed notebooks"
    )
    parser.add_argument("--repository", help="the address of the source, for links and buttons")
    parser.add_argument("--address", help="the address of the published pages, for shared links")
    options = parser.parse_args(arguments)
    try:
        parameters = {name: as_value(name, value) for name, value in options.parameters}
        if options.command in ("run", "all"):
            run(options.only, **parameters)
        if options.command == "tidy":
            tidy()
        if options.command == "keep":
            keep(options.only)
        if options.command in ("build", "all"):
            first = build(options.source, options.repository, options.address)
            print(f"The book is ready: {first}")
    except BookError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
