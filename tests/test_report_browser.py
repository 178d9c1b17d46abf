"""report.html in a real browser: Chromium by Selenium, where both are installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qnpu.compiler.output import PAGE_NAME
from qnpu.compiler.report_page import write_page
from tests.reports import Report, legalized_report, report

webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
service = pytest.importorskip("selenium.webdriver.chrome.service")
wait = pytest.importorskip("selenium.webdriver.support.wait")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = (390, 1440)
SCHEMES = ("light", "dark")
LEAST_CONTRAST = 4.5
HEAT_MAP = "chart-bits"
CHARTS = 11
IMAGES = ("img", "image")

# Text against the nearest background that is not transparent, as WCAG 2 computes it.
CONTRASTS = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
function channels(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
function luminance(colour) {
  const [r, g, b] = colour.slice(0, 3).map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = channels(getComputedStyle(at).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
}
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  const box = element.getBoundingClientRect();
  if (!walker.currentNode.data.trim() || !box.width || !box.height) continue;
  if (element.closest(arguments[0])) continue;
  const style = getComputedStyle(element);
  const ink = channels(element.closest('svg') ? style.fill : style.color);
  const [dark, light] = [luminance(ink), luminance(background(element))].sort((a, b) => a - b);
  found.push([(light + 0.05) / (dark + 0.05), walker.currentNode.data.trim().slice(0, 60)]);
}
return found;
"""
CHART_SIZES = """
return [...document.querySelectorAll('svg[role=img]')].map(chart => {
  const box = chart.getBoundingClientRect();
  const marks = [...chart.querySelectorAll('path, use, text')].filter(
    mark => mark.getBoundingClientRect().width || mark.getBoundingClientRect().height);
  return [box.width, box.height, marks.length];
});
"""
BEYOND = """
const width = document.documentElement.clientWidth;
return [...document.querySelectorAll('body *')].filter(
  item => item.getBoundingClientRect().right > width + 0.5 && !item.parentElement.closest('.scroll')
).map(item => item.outerHTML.slice(0, 100));
"""
FOCUS = """
const item = document.activeElement;
const box = item.getBoundingClientRect();
const style = getComputedStyle(item);
return [item.tagName.toLowerCase(), item.className, box.top, box.width,
        style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0,
        item.textContent.trim().slice(0, 60)];
"""

Open = Callable[[int, str], Any]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=service.Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / PAGE_NAME
    what = report(layers=12)
    what["tensors"][3]["name"] = "an_endless_name_" * 100
    what["diagnostics"][0]["message"] = "an_endless_message_" * 100
    write_page(what, path)
    return path


def show(browser: Any, path: Path, width: int, scheme: str) -> Any:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())
    return browser


@pytest.fixture
def opened(browser: Any, place: Path) -> Open:
    return lambda width, scheme: show(browser, place, width, scheme)


def open_details(page: Any) -> None:
    page.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_loads_without_a_word_in_the_console(opened: Open, width: int, scheme: str) -> None:
    page = opened(width, scheme)
    open_details(page)
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_charts_are_there(opened: Open, width: int) -> None:
    sizes = opened(width, "light").execute_script(CHART_SIZES)
    assert len(sizes) == CHARTS
    assert all(
        wide > 250 and high > 120 and marks > 10  # as many pixels as say anything
        for wide, high, marks in sizes
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_does_not_scroll_sideways(opened: Open, width: int) -> None:
    page = opened(width, "light")
    open_details(page)
    wide, seen = page.execute_script(
        "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
    )
    assert wide <= seen <= width
    assert page.execute_script(BEYOND) == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_stands_out(opened: Open, width: int, scheme: str) -> None:
    page = opened(width, scheme)
    open_details(page)
    # Numbers in coloured cells are black or white, whichever stands out: see test_bit_charts.
    found = page.execute_script(CONTRASTS, f"[id^='{HEAT_MAP}-bits-']")
    assert len(found) > 500
    assert [item for item in found if item[0] < LEAST_CONTRAST] == []


def test_schemes_differ(opened: Open) -> None:
    colours = [
        opened(390, scheme).execute_script(
            "const s = getComputedStyle(document.documentElement);"
            "return [s.backgroundColor, s.color]"
        )
        for scheme in SCHEMES
    ]
    assert colours[0] != colours[1]


def press(page: Any, key: str) -> list[Any]:
    page.switch_to.active_element.send_keys(key)
    focus: list[Any] = page.execute_script(FOCUS)
    return focus


def test_the_keyboard_reaches_everything(opened: Open) -> None:
    page = opened(1440, "light")
    tag, name, top, width, outlined, _ = press(page, keys.TAB)
    assert (tag, name) == ("a", "skip") and top >= 0 and width > 0 and outlined
    reached: list[list[Any]] = []
    while not reached or reached[-1][1] != "skip":  # once round
        reached.append(press(page, keys.TAB))
    links = page.execute_script("return document.querySelectorAll('nav a').length")
    assert [item[0] for item in reached[:links]] == ["a"] * links
    assert all(item[4] for item in reached if item[0] != "body")
    summaries = page.execute_script("return document.querySelectorAll('summary').length")
    assert sum(item[0] == "summary" for item in reached) == summaries


def test_the_skip_link_leads_past_the_navigation(opened: Open) -> None:
    page = opened(390, "light")
    press(page, keys.TAB)
    assert press(page, keys.ENTER)[0] == "main"
    assert press(page, keys.TAB)[0] == "div"  # the first table, not the navigation


def test_the_keyboard_opens_details(opened: Open) -> None:
    page = opened(390, "light")
    focus = press(page, keys.TAB)
    while focus[0] != "summary":
        focus = press(page, keys.TAB)
    closed = "return document.querySelectorAll('details:not([open])').length"
    before = page.execute_script(closed)
    press(page, keys.ENTER)
    assert page.execute_script(closed) == before - 1


def test_links_to_explanations_lead_there(opened: Open) -> None:
    page = opened(390, "light")
    page.execute_script("document.querySelector('#diagnostics a').focus()")
    press(page, keys.ENTER)
    top = page.execute_script(
        "return document.querySelector(':target').getBoundingClientRect().top"
    )
    assert -1 <= top < 900


def all_told(page: Any) -> list[tuple[str, str]]:
    """(role, name) of what a screen reader is told; nothing until all charts are among it."""
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"]
    ]
    return told if sum(role in IMAGES for role, _ in told) == CHARTS else []


def test_what_a_screen_reader_is_told(opened: Open) -> None:
    page = opened(390, "light")
    # The browser builds this tree behind the page: read too early, it lacks some of its nodes.
    told = wait.WebDriverWait(page, 20).until(all_told)
    images = [name for role, name in told if role in IMAGES]
    assert all(images)
    assert "SQNR of tensors by layer" in images
    for role in ("link", "heading", "region", "navigation", "table"):
        names = [name for kind, name in told if kind == role]
        assert names and all(names), role
    assert {role for role, _ in told} >= {"main", "banner", "contentinfo"}


@pytest.mark.parametrize("make", [legalized_report, dict])
def test_reports_that_hold_little(browser: Any, make: Callable[[], Report], tmp_path: Path) -> None:
    path = tmp_path / PAGE_NAME
    write_page(make(), path)
    page = show(browser, path, 390, "dark")
    assert page.get_log("browser") == []
    assert page.execute_script(BEYOND) == []
    found = page.execute_script(CONTRASTS, "none")
    assert found and [item for item in found if item[0] < LEAST_CONTRAST] == []
