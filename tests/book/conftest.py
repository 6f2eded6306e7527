"""The browser that looks at the pages of the book and at JupyterLab."""

from __future__ import annotations

import shutil

import pytest

PATIENCE = 120_000  # milliseconds, for a machine that is busy with other tests
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser():
    """Chromium from the distribution; without it, or without playwright, a test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not (program := next(filter(None, map(shutil.which, CHROMIUM)), None)):
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]  # for containers
        try:
            browser = started.chromium.launch(executable_path=program, args=arguments)
        except playwright.Error as error:
            pytest.skip(f"{program} does not start here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()
