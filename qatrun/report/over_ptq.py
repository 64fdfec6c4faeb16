"""Whether training under quantization beat calibration alone, in a line."""

from __future__ import annotations

from collections.abc import Iterable

from qatrun.records.comparison import OverPtq
from qatrun.text import interval


def over_ptq_lines(found: Iterable[OverPtq]) -> list[str]:
    """A line for each."""
    return [_line(each) for each in found]


def _line(each: OverPtq) -> str:
    measured = []
    if each.perplexity_percent is not None and each.ci_perplexity_percent is not None:
        measured.append(f"perplexity {each.perplexity_percent:+.2f}% [{interval(each.ci_perplexity_percent)}%]")
    measured.append(f"accuracy {each.accuracy_pp:+.2f} pp [{interval(each.ci_accuracy_pp)}]")
    return (
        f"QAT against PTQ, {each.formats}: {each.answer}: {each.qat} against {each.ptq} {', '.join(measured)} over "
        f"{each.num_items:,} items; both intervals hold together at 95%"
        + ("" if each.has_twin else f"; {each.qat} has no BF16 twin, so what training itself did is in it")
    )
