"""The notebooks in JupyterLab, as `make lab` starts it, driven in a real browser."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time

import nbformat
import pytest

from tests.book.conftest import PATIENCE
from tools import book

pytestmark = [pytest.mark.book, pytest.mark.long]
DRIVEN = "A3_authors_code.ipynb"  # the chapter that runs fastest
WIDGET = """
from studies.figures.panel import removal_panel
from studies.slimming import stages
removal_panel(stages.full_size_costs(), ["mid-block"])
"""


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """A function that opens a file of a copy of the notebooks in JupyterLab, and its folder."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(book.NOTEBOOKS, root / "notebooks")
    shutil.copy(book.ROOT / "pyproject.toml", root)
    for path in (root / "notebooks").glob("*.py"):  # the older half, as it may be in a fresh clone
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    kernel = {"kernelspec": {"name": "python3", "display_name": "-", "language": "python"}}
    widget = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(WIDGET)], metadata=kernel)
    nbformat.write(widget, root / "widget.ipynb")
    said = "JUPYTER_CONFIG_PATH=tools/jupyter"  # by `make lab`
    assert f"{said} $(BIN)/jupyter lab" in (book.ROOT / "Makefile").read_text()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    own = {"JUPYTER_CONFIG_PATH": said.partition("=")[2],
           "JUPYTER_CONFIG_DIR": str(root / "config"), "JUPYTER_DATA_DIR": str(root / "data"),
           "PYTHONPATH": str(book.ROOT)}  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
         "--expose-app-in-browser",
         f"--ServerApp.root_dir={root}", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
         "--IdentityProvider.token=reader"],
        cwd=book.ROOT, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    context.set_default_timeout(PATIENCE)

    def opened(path: str):
        tab, address = context.new_page(), f"http://localhost:{port}/lab/tree/{path}"
        for _ in range(120):
            try:
                tab.goto(f"{address}?token=reader&reset")
                break
            except Exception:  # it has not started yet
                assert server.poll() is None, "JupyterLab ended"
                time.sleep(1)
        tab.wait_for_selector(".jp-Notebook .jp-Cell", timeout=PATIENCE)
        tab.wait_for_selector(
            '.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=PATIENCE
        )
        return tab

    yield opened, root
    context.close()
    server.kill()  # asked kindly, it waits for its kernels
    server.wait(30)


def run_all(tab) -> None:
    """Choose Run, Run All Cells, and see that cells wait for the kernel."""
    waiting = tab.locator(".jp-InputArea-prompt", has_text="*").first
    for _ in range(4):  # a click may be lost on a busy machine
        tab.get_by_role("menuitem", name="Run", exact=True).click()
        tab.get_by_text("Run All Cells", exact=True).click()
        try:
            waiting.wait_for(state="attached", timeout=PATIENCE / 4)  # it may be out of sight
            return
        except Exception:
            tab.keyboard.press("Escape")  # a menu that was left open
    raise AssertionError("Run All Cells ran nothing")


def test_every_chapter_opens_unmodified(lab):
    opened, _ = lab
    first, *others = book.notebooks()
    tab = opened(f"notebooks/{first.name}")
    command = "(path) => jupyterapp.commands.execute('docmanager:open', {path}).then(() => null)"
    for path in others:
        tab.evaluate(command, f"notebooks/{path.name}")
    kernels = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
    ready = "([kernels, count]) => document.querySelectorAll(kernels).length === count"
    tab.wait_for_function(ready, arg=[kernels, len(others) + 1], timeout=PATIENCE)
    tab.wait_for_timeout(3000)  # each kernel says what it is, and JupyterLab notes it
    assert tab.locator(".jp-mod-dirty").count() == 0
    tab.close()


def test_the_text_half_opens_as_a_notebook(lab):
    opened, _ = lab
    tab = opened(f"notebooks/{DRIVEN.replace('.ipynb', '.py')}")
    assert tab.locator(".jp-FileEditor").count() == 0
    tab.close()


def test_a_link_leads_from_chapter_to_chapter(lab):
    opened, _ = lab
    tab = opened("notebooks/00_quickstart.ipynb")
    link = tab.locator("a", has_text="The chapter on slimming").first
    link.click()  # scrolls there by itself, again where JupyterLab draws the cell anew meanwhile
    other = tab.locator(".lm-TabBar-tab", has_text="01_unet_slimming.ipynb")
    other.wait_for(timeout=PATIENCE)
    tab.close()


def test_a_chapter_runs_from_top_to_bottom(lab):
    opened, root = lab
    tab, file = opened(f"notebooks/{DRIVEN}"), root / "notebooks" / DRIVEN
    empty = nbformat.read(file, as_version=4)
    wanted = [c.source for c in empty.cells if c.cell_type == "code" and c.source]
    run_all(tab)
    for _ in range(150):
        tab.wait_for_timeout(2000)
        tab.keyboard.press("Control+s")
        tab.wait_for_timeout(500)
        try:
            saved = nbformat.read(file, as_version=4)
        except nbformat.reader.NotJSONError:  # JupyterLab is writing it at this moment
            continue
        cells = [c for c in saved.cells if c.cell_type == "code"]
        errors = [o for c in cells for o in c.outputs if o.output_type == "error"]
        assert not errors, errors[0]
        counts = [c.execution_count for c in cells if c.source]
        if counts == list(range(1, len(wanted) + 1)):
            break
    else:
        raise AssertionError(f"only {counts} of {len(wanted)} cells ran")
    assert any("image/png" in o.get("data", {}) for c in cells for o in c.outputs)
    assert (root / "notebooks" / "outputs" / "A3_authors_code").is_dir()
    tab.close()


def test_a_widget_moves(lab):
    opened, _ = lab
    shown = []
    for _ in range(3):  # a widget may miss its kernel on a busy machine; a reader reloads the page
        tab = opened("widget.ipynb")
        run_all(tab)
        told = tab.locator(".widget-html-content code")
        try:
            told.wait_for(timeout=PATIENCE)  # the kernel imports torch and builds four U-Nets
            break
        except Exception:
            shown += tab.locator(".jp-OutputArea").all_inner_texts()
            tab.close()
    else:
        raise AssertionError(f"no panel, but the cell showed {shown}")
    before = told.inner_text()
    tab.locator(".noUi-handle").first.focus()
    tab.keyboard.press("ArrowRight")
    changed = "(text) => document.querySelector('.widget-html-content code').innerText !== text"
    tab.wait_for_function(changed, arg=before)
    assert tab.locator("input[type=checkbox]:checked").count() == 1
    tab.close()
