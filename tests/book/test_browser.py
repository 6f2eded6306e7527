"""Every page of the book in a real browser, from files, with the network cut off.

Needs Chromium and playwright; `.ci/run` installs the former. `pytest tests/book/test_browser.py
--book build/book/_build/html` looks at a book that was built before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests.book.conftest import PATIENCE
from tools import book, diagram

pytestmark = pytest.mark.book
WIDTHS = {"desktop": 1400, "phone": 390}
SERIOUS = {"serious", "critical"}
# What the theme says the first time that it is opened.
HARMLESS = {"Got invalid theme mode: . Resetting to auto."}
# What lies outside the column that holds it, or makes the page itself wider than the window. What
# scrolls by itself, a long line of code or a wide table, does not count.
TOO_WIDE = """() => {
  const scrolls = (e) => e && e !== document.body &&
    (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)
      || scrolls(e.parentElement));
  const column = document.querySelector('article.bd-article');
  const edge = column ? column.getBoundingClientRect().right + 1 : innerWidth;
  const found = [...(column || document.body).querySelectorAll('img, table, pre, mjx-container')]
    .filter(e => e.getClientRects().length && e.getBoundingClientRect().right > edge)
    .filter(e => !scrolls(e.parentElement))
    .map(e => e.tagName + ' ' + (e.className || '') + ' ' + e.textContent.slice(0, 40));
  if (document.documentElement.scrollWidth > innerWidth)
    found.push('the page: ' + document.documentElement.scrollWidth + ' of ' + innerWidth);
  return found;
}"""
IMAGES = """() => [...document.querySelectorAll('article img')].map(i => ({
  src: i.getAttribute('src').slice(0, 90), alt: (i.getAttribute('alt') || '').trim(),
  width: i.naturalWidth }))"""
LINKS = """() => [...document.querySelectorAll('a[href], svg a')].map(
  a => a.href.baseVal === undefined ? a.href : new URL(a.href.baseVal, document.baseURI).href)"""
AXE = """(rules) => {
  [...document.querySelectorAll('.highlight')].slice(2).forEach(e => { e.dataset.more = 'code' });
  return axe.run({exclude: [['[data-more=code]'], ['mjx-container']]}, rules) }"""
NAMED = """() => [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name)"""
MATHS = """() => ({
  formulas: document.querySelectorAll('.math').length,
  drawn: document.querySelectorAll('.math mjx-container').length,
  errors: [...document.querySelectorAll('mjx-merror')].map(e => e.textContent) })"""


@dataclass
class Visit:
    """What one page showed."""

    page: str
    # Errors in the console, and requests that failed or went out to the network.
    errors: list[str] = field(default_factory=list)
    away: list[str] = field(default_factory=list)
    # What is too wide, by the width of the window.
    wide: dict[str, list[str]] = field(default_factory=dict)
    images: list[dict] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    maths: dict = field(default_factory=dict)
    # Serious violations of axe's rules, by the colour scheme; in the dark of contrast alone.
    violations: dict[str, list[str]] = field(default_factory=dict)


@pytest.fixture(scope="session")
def pages(html) -> list[Path]:
    """The pages that are read: without the listings of source code, and without the redirection."""
    chapters = [html / f"notebooks/{path.stem}.html" for path in book.notebooks()]
    found = [
        p for p in sorted(html.glob("**/*.html")) if "_" not in p.relative_to(html).parts[0][:1]
    ]
    found.remove(html / "index.html")
    assert set(chapters) < set(found)
    return found


def settled(tab, page: Path, query: str = ""):
    """Go to a page and wait until its maths is drawn."""
    tab.goto(page.as_uri() + query)
    tab.evaluate("() => window.MathJax ? MathJax.startup.promise : null")


def violations(tab, **rules) -> list[str]:
    """Serious violations of axe's rules. Of a page's code the first two cells are enough."""
    found = tab.evaluate(AXE, rules | {"preload": False, "resultTypes": ["violations"]})[
        "violations"
    ]
    return [
        f"{violation['id']}, {len(violation['nodes'])} times: {violation['nodes'][0]['html'][:120]}"
        for violation in found
        if violation["impact"] in SERIOUS
    ]


@pytest.fixture(scope="session")
def visits(browser, html, pages) -> list[Visit]:
    """Every page, loaded once and looked at in both widths and both colour schemes."""
    axe = (files("axe_playwright_python") / "axe.min.js").read_text("utf-8")
    context = browser.new_context(offline=True, color_scheme="light")
    context.set_default_timeout(PATIENCE)
    found = []
    for page in pages:
        visit, tab = Visit(str(page.relative_to(html))), context.new_page()

        def requested(request, visit=visit):
            if not request.url.startswith(("file:", "data:", "blob:")):
                visit.away.append(request.url)

        def said(message, visit=visit):
            if message.type == "error" and message.text not in HARMLESS:
                visit.errors.append(message.text)

        tab.on("request", requested)
        tab.on("requestfailed", lambda request, visit=visit: visit.away.append(request.url))
        tab.on("console", said)
        tab.on("pageerror", lambda error, visit=visit: visit.errors.append(str(error)))
        tab.set_viewport_size({"width": WIDTHS["desktop"], "height": 900})
        settled(tab, page)
        visit.wide["desktop"] = tab.evaluate(TOO_WIDE)
        visit.images, visit.links = tab.evaluate(IMAGES), tab.evaluate(LINKS)
        visit.named, visit.maths = tab.evaluate(NAMED), tab.evaluate(MATHS)
        tab.evaluate(axe)
        visit.violations["light"] = violations(tab)
        tab.evaluate("() => { document.documentElement.dataset.theme = 'dark' }")
        tab.wait_for_timeout(500)  # colours pass over into one another
        visit.violations["dark"] = violations(tab, runOnly=["color-contrast"])
        tab.set_viewport_size({"width": WIDTHS["phone"], "height": 900})
        visit.wide["phone"] = tab.evaluate(TOO_WIDE)
        tab.close()
        found.append(visit)
    context.close()
    return found


def faults(visits: list[Visit], of) -> dict[str, list]:
    return {visit.page: found for visit in visits if (found := of(visit))}


def test_no_page_has_an_error_or_asks_the_network(visits):
    assert not faults(visits, lambda visit: visit.errors + visit.away)


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_its_column(visits, width):
    assert not faults(visits, lambda visit: visit.wide[width])


def test_every_image_loads_and_says_what_it_shows(visits):
    def described(text):
        return len(text) >= 15 and not text.endswith((".png", ".jpeg", ".svg"))

    def lacking(visit):
        return [i["src"] for i in visit.images if not i["width"] or not described(i["alt"])]

    assert sum(len(visit.images) for visit in visits) > 20
    assert not faults(visits, lacking)


def test_maths_is_drawn(visits):
    drawn = [v.maths for v in visits if v.maths["formulas"]]
    assert len(drawn) > 3
    assert not faults(visits, lambda v: v.maths["errors"])
    assert not faults(visits, lambda v: [v.maths] if v.maths["drawn"] < v.maths["formulas"] else [])


def test_every_link_leads_somewhere(visits, html):
    names = {visit.page: set(visit.named) for visit in visits}

    def broken(visit):
        found = []
        for link in visit.links:
            url = urlparse(link)
            if url.scheme != "file":
                continue
            target = Path(unquote(url.path))
            inside = target.relative_to(html).as_posix() if target.is_relative_to(html) else None
            known = names.get(inside)
            if not target.is_file() or (
                url.fragment and known and unquote(url.fragment) not in known
            ):
                found.append(link)
        return found

    assert not faults(visits, broken)


def test_the_map_on_the_first_page_leads_to_the_chapters(visits):
    first = next(visit for visit in visits if visit.page == "README.html")
    drawn = {box[5] for box in diagram.BOXES.values()}
    for chapter in (diagram.CHAPTERS[number] for number in drawn):
        assert sum(link.endswith(f"/notebooks/{chapter}.html") for link in first.links) >= 4


def test_the_search_answers(browser, html):
    tab = browser.new_context(offline=True).new_page()
    settled(tab, html / "search.html", "?q=reservoir")
    tab.wait_for_selector("#search-results li a", timeout=PATIENCE)
    assert any("05_buffers" in a for a in tab.evaluate(LINKS))
    tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(visits, scheme):
    assert not faults(visits, lambda visit: visit.violations[scheme])
