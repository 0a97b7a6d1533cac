"""The page of `meprop report` in a browser: it draws, sorts, and can be used by all. `make test-page` sets it up."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("scipy")
pytest.importorskip("playwright", reason="playwright is not installed: make test-page")
pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed: make test-page")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from meprop.reporting.page import write_report
from reported import config, runs, write

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("MEPROP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here: make test-page says what to install"
)

WIDTHS = (1280, 768, 375)
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without a sandbox, as a container has none. The page is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A page with everything: two results that differ, several rules, a simplified run, one that is not finished."""
    folder = tmp_path_factory.mktemp("results")
    checks = [{"step": at, "prunes": at > 3, "widths": {"0": 64 - at, "3": 32}} for at in range(1, 9)]
    found = runs(rules=("sampled", "topk", "simplified"))
    own = {"checks": checks, "activity": {"0": [1 / at for at in range(1, 57)], "3": [0.5] * 32}}
    found = [replace(run, **own) if run.rule == "simplified" else run for run in found]
    found = [replace(run, disturbance={"stolen": 0.0, "others": 0.02 * run.seed}) for run in found]
    late = replace(found[-1], seed=7, curve=found[-1].curve[:2])
    model = {"rule": "simplified", "seed": 0, "width": 40.0, "parameters": 81234, "first_step": 2e-3}
    models = [{**model, "last_step": 1e-3, "inference": {"p20": 4e-4}}]
    first = write(folder / "first", found, running=[late], models=models)
    second = write(folder / "second", runs(1), settings=config(data="ffffff"))
    return write_report([first, second], folder / "page.html")


class Opened:
    """The page in a window, with all that it says on the console and asks the network for."""

    def __init__(self, browser: Browser, path: Any, width: int, scheme: str, **options: Any) -> None:
        self.faults: list[str] = []
        view: Any = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=view, color_scheme=scheme, **options)
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.faults.append(request.url))
        self.page.goto(path.as_uri())
        assert self.faults == [path.as_uri()]
        self.faults.clear()


@pytest.fixture
def opened(browser, path, request):
    width, scheme = getattr(request, "param", (1280, "light"))
    opened = Opened(browser, path, width, scheme)
    yield opened.page
    assert opened.faults == []
    opened.context.close()


EACH = pytest.mark.parametrize(
    "opened", [(width, scheme) for width in WIDTHS for scheme in SCHEMES], indirect=True, ids="{0[0]}-{0[1]}".format
)


@EACH
def test_all_charts_are_drawn_and_nothing_is_wider_than_the_window(opened):
    charts = opened.locator("[data-chart]")
    kinds = charts.evaluate_all("places => places.map(place => place.dataset.chart)")
    assert kinds == ["seconds", "epoch", "parts", "density", "widths", "activity"]
    for at, marks in enumerate(
        ["[data-mark=line] path"] * 2 + ["[data-mark=bar] rect"] + ["[data-mark=line] path"] * 2
    ):
        chart = charts.nth(at).locator("svg[role=img]")
        assert chart.get_attribute("aria-label")
        assert chart.locator(marks).count() >= 3
        assert not any(" NaN" in (each.get_attribute("d") or "") for each in chart.locator("path").all())
        box, place = chart.bounding_box(), charts.nth(at).bounding_box()
        assert box is not None
        assert place is not None
        assert box["width"] <= place["width"]
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


@EACH
def test_axe_finds_nothing_serious(opened):
    for summary in opened.locator("summary").all():
        summary.click()
    found = Axe().run(opened).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")] == []


def column(page, at):
    cells = page.locator(f"section:has(#layers) tbody tr > :nth-child({at})")
    return [text.strip() for text in cells.all_text_contents()]


def test_tables_are_sorted_by_click_and_by_key(opened):
    head = opened.locator("section:has(#layers) thead th").nth(6)
    before = column(opened, 7)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(each) for each in column(opened, 7)] == sorted(map(float, before))
    opened.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(each) for each in column(opened, 7)] == sorted(map(float, before), reverse=True)
    opened.keyboard.press("Tab")  # to the next head
    opened.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "none"
    assert column(opened, 8) == sorted(column(opened, 8))


def test_scores_are_sorted_as_numbers(opened):
    opened.locator("section:has(#quality) thead button").nth(3).click()
    cells = opened.locator("section:has(#quality) table.sortable tbody tr > :nth-child(4)").all_text_contents()
    means = [float(each.split()[0]) for each in cells]
    assert means == sorted(means)


def test_the_colours_can_be_changed(opened):
    def ground():
        return opened.evaluate("getComputedStyle(document.documentElement).backgroundColor")

    light = ground()
    opened.locator("#theme").click()
    dark = ground()
    assert dark != light
    opened.locator("#theme").press("Enter")
    assert ground() == light


def test_printed_it_is_light_and_without_buttons(browser, path):
    printed = Opened(browser, path, 1280, "dark")
    dark = printed.page.evaluate("getComputedStyle(document.documentElement).color")
    printed.page.emulate_media(media="print")
    assert printed.page.evaluate("getComputedStyle(document.documentElement).color") != dark
    assert not printed.page.locator("#theme").is_visible()
    printed.context.close()


def test_the_result_is_downloaded_and_the_command_copied(browser, path):
    opened = Opened(browser, path, 1280, "light", permissions=["clipboard-read", "clipboard-write"])
    with opened.page.expect_download() as download:
        opened.page.locator("[data-download]").first.click()
    content = json.loads(download.value.path().read_text())
    assert content == json.loads((path.parent / "first" / "result.json").read_text())
    button = opened.page.locator("[data-copy]").first
    button.click()
    assert opened.page.evaluate("navigator.clipboard.readText()") == button.get_attribute("data-copy")
    assert opened.page.locator("#said").text_content() == "The command is copied."
    opened.context.close()


def test_without_scripts_the_numbers_are_there(browser, path):
    opened = Opened(browser, path, 1280, "light", java_script_enabled=False)
    assert opened.page.locator("#points-table tbody tr").count() > 50
    assert not opened.page.locator("#theme").is_visible()
    opened.context.close()
