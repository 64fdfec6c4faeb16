"""The page in a browser: nothing is logged, nothing runs over the edge, the pointer reads numbers. Skipped without Chromium.

Playwright drives a Chromium that is installed (`apt-get install chromium`); it downloads none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_seeds import write_seeds
from page_study import Shape, write_study

from qatrun.layout import StudyFolder
from qatrun.study.page import write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")

LONG = "an-arm-whose-name-is-as-long-as-a-name-of-an-arm-may-become-when-nobody-stops-it"
HOSTILE = "\"'><img src=x onerror=alert(1)></svg><script>alert(1)</script>"
SCREENS = [(width, scheme) for width in (390, 1440) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by kind: a broken study with hostile names, a healthy one, one over seeds, and one with little in it."""
    folder = tmp_path_factory.mktemp("pages")
    tasks = (HOSTILE, f"{LONG}/{LONG}", "facts")
    shape = Shape(steps=60, warmup=10, blocks=2, arms=("bf16", LONG, "int8"), prefix=HOSTILE, tasks=tasks)
    bare = write_study(folder / "bare", Shape(steps=30, warmup=10, blocks=1))
    for file in (*bare.glob("*.json"), *bare.glob("*/*.json*"), *bare.glob("*/tensors/*")):
        if file.name != "metrics.jsonl":
            file.unlink()
    made = {
        "broken": write_study(folder / "broken", shape),
        "healthy": write_study(folder / "healthy", Shape(arms=("bf16", "hif8"), broken=False)),
        "seeds": write_seeds(folder / "seeds"),
        "bare": bare,
    }
    return {name: write_page(StudyFolder(study)) for name, study in made.items()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


class Opened:
    """A page in the browser, with everything that went wrong."""

    def __init__(self, browser: Any, page: Path, width: int = 1440, scheme: str = "light") -> None:
        self.wrong: list[str] = []
        self.tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.tab.on("console", lambda message: self.wrong.append(message.text))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.tab.on("request", lambda request: self._see(request.url))
        self.tab.goto(page.as_uri())

    def _see(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.wrong.append(f"asks for {url}")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.tab.close()


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("name", ["broken", "healthy", "seeds", "bare"])
def test_nothing_is_logged_and_nothing_runs_over(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    with Opened(browser, pages[name], width, scheme) as opened:
        opened.tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        assert opened.tab.evaluate("document.documentElement.scrollWidth") <= width
        dark = opened.tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(253, 253, 252)"
        assert dark == (scheme == "dark")
        assert opened.wrong == []


@pytest.mark.parametrize("width", [390, 1440])
def test_one_layout_of_each_figure_is_seen_and_no_text_is_lost(
    browser: Any, pages: dict[str, Path], width: int
) -> None:
    shown, hidden = ("narrow", "wide") if width == 390 else ("wide", "narrow")
    with Opened(browser, pages["healthy"], width) as opened:
        boxes = opened.tab.evaluate(
            f"[...document.querySelectorAll('.{shown} svg')].map((svg) => svg.getBoundingClientRect().width)"
        )
        assert boxes
        assert min(boxes) > 300
        assert not opened.tab.evaluate(
            f"[...document.querySelectorAll('.{hidden} svg')].some((svg) => svg.getBoundingClientRect().width > 0)"
        )
        # All text of a drawing lies within it, and none of it is smaller than can be read.
        outside = opened.tab.evaluate(
            """(shown) => [...document.querySelectorAll(`.${shown} svg`)].flatMap((svg) => {
              const box = svg.getBoundingClientRect();
              return [...svg.querySelectorAll("text")].filter((text) => {
                const own = text.getBoundingClientRect();
                return own.left < box.left - 2 || own.right > box.right + 2 || own.bottom > box.bottom + 2;
              }).map((text) => text.textContent);
            })""",
            shown,
        )
        assert outside == []


def test_the_pointer_reads_numbers(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["healthy"]) as opened:
        for figure, expected in (
            ("loss", r"step \d+ · bf16 loss \d\.\d+ · hif8 loss \d\.\d+ · hif8 APE % [\d.e−]+"),
            ("saturation-hif8", r"model\.layers\.\d\.\S+:input · step [\d,]+ · [\d.]+× overshoot"),
            ("scale-hif8", r"model\.layers\.\S+ · step [\d,]+ · amax [\d.]+ · amax that the scale stands for [\d.]+"),
            ("histograms-hif8", r"model\.layers\.\S+ .* · \|x\| / scale from 2\^\S+ · to 2\^\S+ · values [\d,]+"),
            ("forgetting", r"step \d+ · bf16 KL, quantizers off \d\.\d+"),
        ):
            drawing = opened.tab.locator(f"#figure-{figure} .wide svg")
            drawing.scroll_into_view_if_needed()
            drawing.hover(position={"x": 300, "y": 60})
            sync_api.expect(opened.tab.locator(f"#figure-{figure} output")).to_have_text(_pattern(expected))
        assert opened.wrong == []


def test_the_pointer_reads_what_the_csv_says(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["healthy"]) as opened:
        drawing = opened.tab.locator("#figure-saturation-hif8 .wide svg")
        drawing.scroll_into_view_if_needed()
        drawing.hover(position={"x": 400, "y": 60})
        name, step, value = opened.tab.locator("#figure-saturation-hif8 output").inner_text().split(" · ")
    lines = (pages["healthy"].parent / "report" / "saturation-hif8.csv").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"{name},")).split(",")
    expected = float(row[lines[0].split(",").index(step)])
    assert float(value.partition("×")[0]) == pytest.approx(expected, rel=0.06)  # two digits


def test_on_a_phone_one_can_find_ones_way_and_sees_the_verdict(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["healthy"], 390) as opened:
        link = opened.tab.locator("nav a", has_text="Scores")
        link.click()
        top = opened.tab.evaluate("document.querySelector('#scores').getBoundingClientRect().top")
        assert 0 <= top < 120
        assert opened.tab.locator("nav").bounding_box()["y"] == 0  # it stays
        for table in ("#total .standing table", "#scores .standing table"):
            head = opened.tab.locator(f"{table} th", has_text="verdict").first.bounding_box()
            assert head["x"] + head["width"] <= 390
        term = opened.tab.locator("abbr").first
        assert term.get_attribute("title")


def test_it_prints(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["broken"], scheme="dark") as opened:
        opened.tab.emulate_media(media="print", color_scheme="dark")
        assert opened.tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 252)"
        assert opened.tab.pdf(format="A4").startswith(b"%PDF")
        assert opened.wrong == []


def _pattern(text: str) -> Any:
    import re

    return re.compile(text)
