"""The page of an inspection: every tensor, worst first, and how the values of the worst are spread over the grid."""

from __future__ import annotations

from collections.abc import Sequence

from qatrun.records.inspection import Inspection
from qatrun.records.quantized import HistogramRecord
from qatrun.report.page.content import ArmContent
from qatrun.report.page.document import Chip, Document, Section, Verdict
from qatrun.report.page.histograms import histogram_figure
from qatrun.report.page.table import printable, sentence_case, table

COLUMNS = (
    *("tensor", "advice", "least", "largest", "outlier ratio", "outliers"),
    *("SQNR dB", "SQNR dB, typical", "best amax", "SQNR dB, best"),
    *("SQNR dB, rows", "zero-point", "SQNR dB, asymmetric"),
)


def inspection_document(name: str, found: Inspection, histograms: Sequence[HistogramRecord]) -> Document:
    """Everything on the page.

    Args:
        histograms: those that are drawn.
    """
    rows = [
        (
            each.tensor,
            "; ".join(each.advice),
            each.low,
            each.high,
            each.outlier_ratio,
            each.num_outliers,
            each.sqnr_db,
            each.typical_sqnr_db,
            each.best_amax,
            each.best_sqnr_db,
            each.row_sqnr_db,
            each.zero_point,
            each.asymmetric_sqnr_db,
        )
        for each in found.tensors
    ]
    advised = sum(bool(each.advice) for each in found.tensors)
    chip = Chip(f"Advice on {advised} of {len(rows)} tensors", "warn") if advised else Chip("Nothing to change", "good")
    content, of = (
        ArmContent(found.model, 0, None, histograms=histograms),
        "the worst tensors, one scale for the amax of each",
    )
    drawn = histogram_figure(content, "histograms", len(histograms), of)
    sections = (
        Section("tensors", "Tensors", tables=(table(COLUMNS, rows, "Every tensor, worst first", "tensors"),)),
        Section("histograms", "Values on the grid", figures=(drawn,) if drawn else ()),
    )
    condition = (
        f"{found.num_tokens:,} tokens of {found.data}. SQNR: signal over quantization noise of the tensor alone, with one "
        "scale for its amax; typical: of values within the median channel's range, whose loss large channels hide; best: "
        "for the amax that loses least; rows: a scale for each token of an input, each channel of a weight. Outliers: "
        "channels 8 times the median."
    )
    meta = tuple(map(printable, (found.model, found.format)))
    verdict = Verdict((chip,), printable(sentence_case(found.answer)), condition=printable(condition))
    return Document(name, "inspection", meta, verdict, sections, {})
