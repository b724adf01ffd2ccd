"""The report in a real browser: nothing hostile runs, everything can be reached, and it fits any screen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright
from synthetic_run import write_run
from test_report import HOSTILE

from repro.recipes.selftest import GOLDEN
from repro.reports.write import write_report

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
SCHEMES = ("light", "dark")
WIDTHS = (390, 820, 1440)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs whose captions, names and flags are hostile, among pictures that are not."""
    root = tmp_path_factory.mktemp("report")
    pictures = sorted((GOLDEN / "inputs" / "images" / "val").iterdir())
    rows = [(str(path), f"a dog number {place}", "a dog") for place, path in enumerate(pictures)]
    rows += [(f"{text}.jpg", text, text) for text in HOSTILE]
    dropped = [{"split": t, "row": 1, "image_path": t, "caption": t, "reason": t} for t in HOSTILE]
    for name, steps in (("one", 300), ("two</title><script>window.hit = 1</script>".replace("/", "∕"), 200)):
        write_run(root / name / "run", rows, num_steps=steps, dropped=dropped, hostile={t[:40]: t for t in HOSTILE})
    write_report(sorted(root.iterdir()), root / "report.html")
    return root / "report.html"


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Callable[..., Page]]:
    """Opens the report; afterwards there must have been no request, error or message."""
    said: list[str] = []
    contexts = []

    def open_page(**settings: Any) -> Page:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        page.goto(report.as_uri())
        return page

    yield open_page
    assert said == []
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_any_screen_and_nothing_hostile_runs(opened, width, scheme):
    page = opened(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.hit") is None
    for details in page.locator("details").all():
        details.locator("summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing(opened, scheme):
    # Axe is a script of its own, which the page's policy would refuse.
    page = opened(color_scheme=scheme, bypass_csp=True)
    found = Axe().run(page).response["violations"]
    assert [(violation["id"], violation["nodes"][0]["html"][:120]) for violation in found] == []


def test_captions_are_found_by_their_words_and_shown_as_text(opened):
    page = opened()
    page.get_by_label("Find in captions").fill("003.JPG dog")
    expect(page.locator("#found .card")).to_have_count(1)
    assert page.locator("#found .caption").all_inner_texts() == ["a dog number 3"] * 2
    assert page.locator("#found img").count() == 1
    page.get_by_label("Find in captions").fill("window.hit")
    expect(page.locator("#found .card")).to_have_count(2)
    assert "<img src=x onerror" in page.locator("#found").inner_text()
    assert page.evaluate("window.hit") is None


def test_curves_are_read_by_keyboard_and_runs_hidden(opened):
    page = opened()
    frame = page.locator(".frame").first
    frame.focus()
    page.keyboard.press("Home")
    reading = page.locator(".reading").first
    assert reading.inner_text().startswith("step 1: one 3")
    page.keyboard.press("ArrowRight")
    assert reading.inner_text().startswith("step 2: one 1.5")
    page.locator("[data-toggle='0']").uncheck()
    assert page.locator(".inner [data-run='0']").first.is_hidden()
    assert page.locator(".inner [data-run='1']").first.is_visible()


def test_a_chart_is_zoomed_made_logarithmic_and_saved(opened):
    page = opened()
    figure = page.locator(".chart").first
    line = lambda: figure.locator(".line").first.get_attribute("d")  # noqa: E731
    whole = line()
    figure.locator(".frame").press("+")
    assert line() != whole
    figure.get_by_role("button", name="show the whole").click()
    assert line() == whole
    figure.get_by_role("button", name="logarithmic").click()
    assert line() != whole
    with page.expect_download() as saved:
        figure.get_by_role("button", name="CSV").click()
    assert saved.value.path().read_text(encoding="utf-8").splitlines()[1].startswith("1,3,")


def test_captions_are_ordered_filtered_and_enlarged(opened):
    page = opened()
    page.get_by_label("Order").select_option("worst first")
    page.get_by_label("Score from").fill("1")
    expect(page.locator("#found .caption + .score").first).to_have_text("ROUGE-L 66.7")
    scores = [float(text.split()[1]) for text in page.locator("#found .caption + .score").all_inner_texts()]
    assert scores == sorted(score for score in scores if score >= 1)
    picture = page.locator("#found img").first
    small = picture.bounding_box()["height"]
    picture.click()
    assert picture.bounding_box()["height"] > small
    page.get_by_label("Find in captions").fill("no such caption")
    expect(page.get_by_role("status")).to_have_text("No image matches.")


def test_without_scripts_the_page_can_be_read(opened):
    page = opened(java_script_enabled=False)
    assert "one: 3 at step 1" in page.locator(".summary").first.inner_text()
    assert page.locator(".card").count() > 5
    assert page.locator(".search").is_hidden()
