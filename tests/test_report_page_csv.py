"""The page's CSV files hold numbers, however a person reads them on the page."""

from __future__ import annotations

import csv
from pathlib import Path

from page_study import Shape, write_study

from qatrun.layout import StudyFolder
from qatrun.report.page.table import csv_text, estimate, shown, table
from qatrun.study.page import read_study, write_page

WORDS = {"arm", "verdict", "format", "task", "metric", "cause", "answer", "seen on", "effect", "unit", "from", "to"}


def test_numbers_are_numbers(tmp_path: Path) -> None:
    study = StudyFolder(write_study(tmp_path / "study", Shape(steps=40, warmup=10, blocks=1, arms=("bf16", "hif8"))))
    write_page(study)
    rows: dict[str, list[dict[str, str]]] = {}
    for name in ("ranking", "evidence", "arms", "causes", "attribution"):
        file = study.csv / f"{name}.csv"
        if not file.is_file():
            continue
        with file.open(encoding="utf-8", newline="") as stream:
            rows[name] = list(csv.DictReader(stream))
        cells = [row[column] for row in rows[name] for column in row.keys() - WORDS]
        assert [float(cell) for cell in cells if cell]
    assert rows.keys() >= {"ranking", "evidence", "arms", "attribution"}
    expected = [task.flips_to_wrong for pair in read_study(study).pairs for task in pair.comparison.tasks]
    assert [int(row["flips to wrong"]) for row in rows["evidence"]] == expected


def test_a_cell_that_is_read_as_a_text_keeps_its_numbers() -> None:
    made = table(("arm", "drop pp"), [("a", estimate(-0.913, (-1.2, 0.25))), ("b", None)])
    assert csv_text([made]) == "arm,drop pp,drop pp low,drop pp high\na,-0.913,-1.2,0.25\nb,,,\n"
    assert shown(made.rows[0][1]) == "−0.91 [−1.20 to +0.25]"
    assert made.words == {"arm"}
