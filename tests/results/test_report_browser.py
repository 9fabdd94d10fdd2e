"""The report of a study in headless Chromium: nothing fetched, run, cut off or unreadable."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lightning_robust.results import write_report
from tests.results.synthetic_study import PARTS, Plan, grid, write_study

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

EVIL = "<script>window.ran = 1</script><img src=x onerror=window.ran=2>"
LONG = "a-name-that-nobody-should-give-to-a-defense-but-that-somebody-will-give-to-it"
VIEWS = {
    "desktop-light": (1280, "light", "screen"),
    "desktop-dark": (1280, "dark", "screen"),
    "phone-light": (390, "light", "screen"),
    "phone-dark": (390, "dark", "screen"),
    "print": (794, "dark", "print"),
}
CONTRAST = """() => {
  const rgb = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
  const light = colour => {
    const [r, g, b] = colour.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = element => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) layers.push(rgb(getComputedStyle(one).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest('style')) continue;
    const style = getComputedStyle(element), below = ground(element);
    const ink = over(rgb(element.closest('svg') ? style.fill : style.color), below);
    const [dark, bright] = [light(ink), light(below)].sort((a, b) => a - b);
    const ratio = (bright + .05) / (dark + .05);
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${element.outerHTML.slice(0, 160)}`);
  }
  return faint;
}"""
COVERED = """least => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    const texts = [...svg.querySelectorAll('text')].filter(one => one.textContent.trim());
    const boxes = texts.map(one => [one.textContent, one.getBoundingClientRect()]);
    const frame = svg.getBoundingClientRect();
    boxes.forEach(([name, a], i) => {
      if (a.left < frame.left - 2 || a.right > frame.right + 2 || a.top < frame.top - 2 || a.bottom > frame.bottom + 2)
        found.push(`${name} is cut off`);
      const size = parseFloat(getComputedStyle(texts[i]).fontSize) * frame.width / svg.viewBox.baseVal.width;
      if (size < least) found.push(`${name} has ${size} px`);
      for (const [other, b] of boxes.slice(i + 1))
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2)
          found.push(`${name} covers ${other}`);
    });
  }
  return found;
}"""
HEADINGS = "() => [...document.querySelectorAll('h1, h2, h3, h4')].map(one => Number(one.tagName[1]))"
REGIONS = """() => [...document.querySelectorAll('*')].filter(one => {
  const style = getComputedStyle(one);
  return ['auto', 'scroll', 'hidden'].includes(style.overflowX) && one.scrollWidth > one.clientWidth + 1;
}).map(one => [one.className, one.tabIndex, one.getAttribute('role'), one.getAttribute('aria-label') || ''])"""
UNNAMED = """() => [...document.querySelectorAll('svg, [role=img], [role=region], nav')]
  .filter(one => !one.getAttribute('aria-label')).map(one => one.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden study: all aims, hostile and long names, two backbones, one seed, and too few items."""
    folder = tmp_path_factory.mktemp("golden")
    plans = [
        *grid(3),
        Plan(EVIL, "adversarial", {"attack": 0.1}, defense=EVIL),
        Plan(LONG, "ood", {"ood": 0.1}),
    ]
    parts = {**PARTS, f"ood/{EVIL}": 0.7, "adversarial/few": 0.6}
    texts = (f"a gorgeous {EVIL} movie", "an honest story", "the plot is thin", "a mess", "rather charming")
    write_study(
        folder / "study", plans, num_items=60, parts=parts, sizes={"adversarial/few": 12}, texts=texts, unparsed=0.3,
        label_names=[EVIL, "positive"], doubts=[{"message": EVIL}],
    )  # fmt: skip
    other = [Plan("plain", backbone=EVIL), Plan("fgm", "adversarial", {"attack": 0.2}, backbone=EVIL)]
    write_study(folder / "study" / "other", other, seeds=1, num_items=60)
    return write_report(folder / "study", folder / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


class Opened:
    """A page with what happened while it was opened."""

    def __init__(self, browser: Any, report: Path, view: str) -> None:
        self.width, scheme, media = VIEWS[view]
        self.print = media == "print"
        self.happened: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(viewport={"width": self.width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.emulate_media(media=media, color_scheme=scheme)
        self.page.on("console", lambda message: self.happened.append(message.text))
        self.page.on("pageerror", lambda error: self.happened.append(str(error)))
        self.page.on("dialog", lambda dialog: self.happened.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())
        if media == "screen":
            self.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")


@pytest.fixture(scope="module", params=VIEWS)
def opened(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Opened]:
    found = Opened(browser, report, request.param)
    yield found
    found.context.close()


def test_nothing_is_fetched_or_run(opened: Opened, report: Path) -> None:
    assert opened.happened == []
    assert opened.requests == [report.as_uri()]
    assert opened.page.evaluate("window.ran") is None
    assert opened.page.evaluate("document.querySelectorAll('script, img, iframe, object, link').length") == 0


def test_hostile_names_are_shown(opened: Opened) -> None:
    shown = opened.page.inner_text("body")
    # As a backbone, condition, environment, class, doubt, item and recipe.
    assert shown.count(EVIL) > 20
    assert opened.page.locator("article.card dd", has_text=EVIL).count()


def test_the_page_does_not_scroll_sideways(opened: Opened) -> None:
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= opened.width


def test_what_scrolls_is_named_and_reached_by_keyboard(opened: Opened) -> None:
    regions = opened.page.evaluate(REGIONS)
    if opened.width == 390:
        assert len(regions) > 3
    assert [region for region in regions if region[1:3] != [0, "region"] or not region[3]] == []
    names = [region[3] for region in regions]
    assert len(names) == len(set(names))


def test_text_stands_out(opened: Opened) -> None:
    assert opened.page.evaluate(CONTRAST) == []


def test_labels_of_figures_are_whole_and_apart(opened: Opened) -> None:
    assert opened.page.locator("svg").count() >= 8
    assert opened.page.evaluate(COVERED, 8 if opened.print else 10) == []


def test_structure(opened: Opened) -> None:
    levels = opened.page.evaluate(HEADINGS)
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert opened.page.evaluate(UNNAMED) == []
    figures, captions = (opened.page.locator(name).count() for name in ("figure", "figure > figcaption"))
    assert figures == captions >= 5
    tables = opened.page.locator("table:not(.heat)").count()
    assert opened.page.locator("table:not(.heat) > caption").count() == tables >= 5


def test_arrow_keys_scroll_a_wide_table(browser: Any, report: Path) -> None:
    page = Opened(browser, report, "phone-light").page
    region = page.locator(".scroll").first
    region.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0", timeout=3000)
    page.context.close()


def test_tab_reaches_every_region_in_order(browser: Any, report: Path) -> None:
    page = Opened(browser, report, "phone-light").page
    expected = page.evaluate("[...document.querySelectorAll('.scroll')].map(one => one.ariaLabel)")
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.ariaLabel"))
    assert [name for name in reached if name in expected][: len(expected)] == expected
    page.context.close()


def test_dark_and_light_differ_and_paper_is_light(browser: Any, report: Path) -> None:
    grounds = {}
    for view in ("desktop-light", "desktop-dark", "print"):
        found = Opened(browser, report, view)
        grounds[view] = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        found.context.close()
    assert grounds["print"] == "rgb(255, 255, 255)"
    assert len(set(grounds.values())) == 3


def test_paper_shows_what_is_folded(browser: Any, report: Path) -> None:
    found = Opened(browser, report, "print")
    folded = found.page.evaluate(
        "[...document.querySelectorAll('details:not([open])')].filter(one => one.offsetHeight < 60).length"
    )
    assert folded == 0
    found.context.close()
