"""Tables and the live view on terminals of any width: no number is cut."""

from __future__ import annotations

import io
import re

import pytest
from page_study import write_study
from rich.console import Console, RenderableType
from test_report import HOSTILE, ROW, a_dry_run, a_model, a_pair, drawn

from qatrun.files import read_json
from qatrun.records.comparison import StudyComparison
from qatrun.records.diagnosis import StudyDiagnosis
from qatrun.report import TerminalDisplay, comparison_table, dry_run, score_table
from qatrun.report.diagnosis import diagnosis_table
from qatrun.report.grid import Grid
from qatrun.report.overview import overview
from qatrun.report.total import totals

SCORED = {"name": "t", "num_fewshot": 5, "metric": "acc_norm", "num_items": 14_042, "accuracy": 0.51, "stderr": 0.0042}


@pytest.fixture(scope="module")
def screens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RenderableType]:
    folder = tmp_path_factory.mktemp("studies")
    study = write_study(folder / "one")

    diagnosis = read_json(study / "diagnosis.json", StudyDiagnosis)
    return {
        "comparison": comparison_table(read_json(study / "comparison.json", StudyComparison).pairs[0]),
        "scores": score_table(a_model({**SCORED, "num_truncated": 1234}, "m")),
        "dry run": dry_run(a_dry_run(name="x", num_parameters=2_437_632, disk_bytes={"at the end": 2**21})),
        "diagnosis": diagnosis_table(next(iter(diagnosis.arms.values()))),
    }


def numbers(lines: list[str]) -> set[str]:
    """Whatever holds a digit, between blanks, but for names; and intervals whole."""
    text = "\n".join(lines)
    words = {word for word in text.split() if re.match(r"[+−~\d-]*\d", word)}
    return {*words, *re.findall(r"[+-][\d.]+ \.\. [+-][\d.]+", text)}


@pytest.mark.parametrize("width", [100, 80, 60, 40])
@pytest.mark.parametrize("screen", ["comparison", "scores", "dry run", "diagnosis"])
def test_a_narrow_terminal_cuts_no_number(screens: dict[str, RenderableType], screen: str, width: int) -> None:
    wide, narrow = drawn(screens[screen], 1000), drawn(screens[screen], width)
    assert max(len(line.rstrip()) for line in narrow) <= width
    assert "…" not in "".join(narrow)
    assert numbers(wide) <= numbers(narrow)
    assert len(numbers(wide)) >= 5


def test_a_row_that_fits_no_line_is_a_paragraph() -> None:
    grid = Grid("title", "task", "accuracy", "95% interval", "verdict", "left out")
    grid.add_row("demo_facts", "84.45", "-0.21 .. +0.94", "within", "")
    grid.add_row(HOSTILE, "9.00", "-10.21 .. +10.94", "exceeds", "3")
    assert [line.rstrip() for line in drawn(grid, 34)] == [
        "title",
        "demo_facts",
        "  accuracy 84.45",
        "  95% interval -0.21 .. +0.94",
        "  verdict within",
        HOSTILE,
        "  accuracy 9.00",
        "  95% interval -10.21 .. +10.94",
        "  verdict exceeds  left out 3",
    ]


def test_a_header_is_folded_before_a_number() -> None:
    lines = drawn(comparison_table(a_pair(arm="x" * 30, twin="y" * 30)), 80)
    assert any(line.split()[:3] == ["demo_facts", "75.12", "76.25"] for line in lines)


@pytest.mark.parametrize("width", [71, 60, 40])
def test_the_live_view_of_a_narrow_terminal_cuts_no_number(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    display = TerminalDisplay(console)
    display.begin_training("hif8-window-64-most-recent-and-more", 0, 100_000)
    display.on_step({**ROW, "step": 12_345})
    lines = drawn(display._progress, width)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert {"12345/100000", "2.5000", "1.0e-04", "123,457", "saturated", "3"} <= set(words)


def test_no_word_of_the_field_is_broken_in_a_header() -> None:
    screen = overview(totals([a_pair()], {}, {}))
    assert any({"accuracy", "perplexity", "verdict"} <= set(line.split()) for line in drawn(screen, 80))
    assert not any("perplexit" in line.split() for width in range(50, 100) for line in drawn(screen, width))
