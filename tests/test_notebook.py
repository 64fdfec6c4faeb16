"""A study in a notebook: the one that ships runs, one line changes, and a result shows itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, ROW
from test_report_total import one

from qatrun.report.notebook import NotebookDisplay, result_html
from qatrun.report.stages import Stage

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def test_the_notebook_that_ships_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "it ships without outputs"
            exec("".join(cell["source"]), names)
    shown = names["result"]._repr_html_()
    assert "<th>accuracy</th>" in shown
    assert "runs/quickstart/report.html" in shown
    assert (tmp_path / "runs/quickstart/report.html").is_file()


def test_one_line_changes_and_alarms_stay_below_it() -> None:
    seen: list[str] = []
    with NotebookDisplay(seen.append) as display:
        display.begin_study([Stage("scoring", HOSTILE, 1), Stage("training", "hif8", 10)])
        display.begin_reading(HOSTILE)
        display.begin_scoring(HOSTILE)
        display.on_scored(HOSTILE, 8, 8)
        display.begin_training("hif8", 0, 10, {5: 2.25})
        for step in range(1, 11):
            display.on_step({**ROW, "step": step})
        display.on_alarm("<b>it clips</b>")
    assert any("2 of 2: training hif8" in html and "step 5 of 10, loss 2.5000 (twin 2.2500)" in html for html in seen)
    assert all(html.count("training hif8") <= 1 for html in seen)
    assert len(seen) < 10
    assert "&lt;b&gt;it clips&lt;/b&gt;" in seen[-1]


def test_a_result_shows_itself_and_nothing_green_beside_an_alarm() -> None:
    assert "#14713f" in result_html([one()], "nothing broke", None)
    shown = result_html([one(alarms=1, arm="<script>")], "", Path("runs/x/report.html"))
    assert "#14713f" not in shown
    assert "<script>" not in shown
