"""How tensors are spread, as a table, worst first."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from qatrun.records.inspection import Inspection, TensorInspection
from qatrun.report.grid import Grid

SHOWN = 16


def inspection_table(found: Inspection) -> RenderableType:
    """inspection.json."""
    table = Grid(
        f"{found.model} in {found.format}, {found.num_tokens:,} tokens of {found.data}",
        *("tensor", "least", "largest", "outliers", "dB", "typical", "best", "rows", "advice"),
    )
    for each in found.tensors[:SHOWN]:
        ratio = "" if not each.num_outliers or each.outlier_ratio is None else f" {each.outlier_ratio:.0f}x"
        table.add_row(
            Text(each.tensor),
            f"{each.low:.3g}",
            f"{each.high:.3g}",
            f"{each.num_outliers}{ratio}" if each.num_outliers else "",
            *("" if value is None else f"{value:.1f}" for value in _decibels(each)),
            Text("; ".join(each.advice)),
        )
    more = len(found.tensors) - SHOWN
    rest = [Text(f"... and {more} more, in report/tensors.csv", "dim")] if more > 0 else []
    key = Text(
        "dB: with one scale for the amax; typical: of the median channel; best: for the best amax; rows: for each",
        "dim",
    )
    return Group(table, *rest, key, Text(), Text(found.answer))


def _decibels(each: TensorInspection) -> tuple[float | None, ...]:
    return each.sqnr_db, each.typical_sqnr_db, each.best_sqnr_db, each.row_sqnr_db
