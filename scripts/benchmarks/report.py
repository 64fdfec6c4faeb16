"""What is done with rows: tables on screen, a JSON file with all that a number needs to be believed, a Markdown page, and
the bands that ratios must stay in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.timing import Row

# How far a ratio may move from where it was recorded: what repetitions on a busy machine were seen to do, and then some.
SLACK = {
    "kernel": 0.35,
    "step": 0.12,
    "watch": 0.03,
    "memory saved": 0.02,
    "memory peak": 0.08,
    "eval": 0.15,
    "scaling operations": 0.0,
    "scaling time": 0.15,
    "scaling memory": 0.08,
}
MAX_SECOND_START_S = 5.0


def table_of(benchmark: str, rows: Sequence[Row]) -> Table:
    """The table on screen."""
    unit = "seconds" if rows[0].unit == "s" else f"relative to {rows[0].reference}"
    table = Table(title=f"{benchmark}: {unit}, median (quartiles)", title_justify="left")
    header, *lines = grid_of(rows)
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left", no_wrap=not column)
    for line in lines:
        table.add_row(*line)
    return table


def grid_of(rows: Sequence[Row]) -> list[list[str]]:
    """A header and lines of cells: arms by cases, the longer way down."""
    cases, arms = list(dict.fromkeys(row.case for row in rows)), list(dict.fromkeys(row.arm for row in rows))
    cells = {(row.case, row.arm): cell_of(row) for row in rows}
    if len(cases) > len(arms):
        return [["", *arms]] + [[case, *(cells.get((case, arm), "") for arm in arms)] for case in cases]
    return [["", *cases]] + [[arm, *(cells.get((case, arm), "") for case in cases)] for arm in arms]


def cell_of(row: Row) -> str:
    """A number as a table shows it."""
    return (
        f"{row.value:.2f}"
        if row.n == 1 or row.unit == "exponent"
        else f"{row.value:.2f} ({row.low:.2f}-{row.high:.2f})"
    )


def read_results(path: Path) -> dict[str, Any]:
    """benchmark -> {environment, settings, rows} of a results file; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def rows_of(results: Mapping[str, Any]) -> list[Row]:
    """All rows of a results file."""
    return [Row(**row) for section in results.values() for row in section["rows"]]


def section_of(rows: Sequence[Row], settings: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """One benchmark's part of a results file."""
    return {"environment": environment, "settings": settings, "rows": [asdict(row) for row in rows]}


def bands_of(rows: Iterable[Row]) -> dict[str, list[float]]:
    """key -> [lowest, highest] ratio that is no cause for alarm."""
    bands = {}
    for row in rows:
        if row.key == "startup/second start/hif8":
            bands[row.key] = [-MAX_SECOND_START_S, MAX_SECOND_START_S]
        elif row.unit == "ratio" and row.arm != row.reference and not row.arm.startswith(("torchao", "scale_copy")):
            slack = SLACK.get(row.benchmark, SLACK.get(f"{row.benchmark} {row.case.split()[0]}", 0.0))
            bands[row.key] = [round(row.value * (1 - slack), 3), round(row.value * (1 + slack), 3)]
    return bands


def outside(rows: Iterable[Row], bands: Mapping[str, Sequence[float]]) -> list[str]:
    """A line for each row that left its band, and one if nothing could be checked."""
    checked = [row for row in rows if row.key in bands]
    if not checked:
        return ["no recorded band fits what was measured: run `make bench`"]
    complaints = []
    for row in checked:
        low, high = bands[row.key]
        if not low <= row.value <= high:
            complaints.append(f"{row.key}: {row.value:.3f} {row.unit}, recorded band {low:.3f} .. {high:.3f}")
    return complaints
