"""Whether training under quantization beat calibration alone: a section of a study's page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qatrun.records.comparison import OverPtq
from qatrun.report.over_ptq import over_ptq_lines
from qatrun.report.page.document import Point, Section
from qatrun.report.page.table import printable, table


def over_ptq_section(found: Sequence[OverPtq]) -> Iterator[Section]:
    """Whether training beat calibration alone; nothing where a study does not ask it."""
    if not found:
        return
    columns = (
        *("formats", "QAT arm", "PTQ arm", "answer", "items", "accuracy pp", "low pp", "high pp"),
        *("perplexity %", "low %", "high %"),
    )
    rows = [
        (
            *(each.formats, each.qat, each.ptq, each.answer, each.num_items),
            *(each.accuracy_pp, *each.ci_accuracy_pp),
            *(each.perplexity_percent, *(each.ci_perplexity_percent or (None, None))),
        )
        for each in found
    ]
    title = "QAT arm minus PTQ arm; intervals of both measures hold together at 95%"
    points = tuple(Point(printable(line)) for line in over_ptq_lines(found))
    yield Section(
        "over-ptq", "QAT against PTQ", tables=(table(columns, rows, title, "qat-against-ptq"),), points=points
    )
