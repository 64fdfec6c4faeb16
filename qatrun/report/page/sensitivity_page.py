"""The page of a sensitivity search: the curve, and every group."""

from __future__ import annotations

from typing import Any

import numpy as np

from qatrun.records.sensitivity import Sensitivity
from qatrun.report.page.curves import scaled
from qatrun.report.page.document import Chip, Document, Section, Verdict
from qatrun.report.page.figure import WIDE, Figure, Key, Layout, Plot, canvas, draw
from qatrun.report.page.render import style_sheet
from qatrun.report.page.svg import standalone
from qatrun.report.page.table import printable, sentence_case, table
from qatrun.report.page.theme import INK, arm_color, arm_marker
from qatrun.report.sensitivity import in_short

CURVE_PX = 300
ANNOTATED = 0.05  # of the cost: groups that carry as much are named along the curve


def sensitivity_document(name: str, found: Sensitivity) -> Document:
    """Everything on the page."""
    kept = sum(group.kept for group in found.groups)
    some = Chip(f"{kept} of {len(found.groups)} groups to keep", "warn")
    chips = [some if kept else Chip("Nothing to keep", "good")]
    if found.flat:
        chips.append(Chip("Flat curve", "none"))
    rows = [
        (
            printable(in_short(group.linears)),
            "keep" if group.kept else "",
            group.num_weights,
            100 * group.share,
            group.nats,
            group.sqnr_db,
            group.bits,
        )
        for group in found.groups
    ]
    columns = ("tensor", "keep", "weights", "share %", "nats a token", "SQNR dB", "bits if kept")
    groups = table(columns, rows, "Groups, those first that cost most for each weight", "groups")
    fragment = (f"{found.fragment} extends the recipe with this choice.",) if found.fragment else ()
    num_scored, num_held_out = found.num_tokens
    sections = (
        Section("curve", "What remains", figures=(curve_figure(found),), notes=fragment),
        Section("groups", "Groups", tables=(groups,)),
    )
    condition = (
        f"Scored by {found.method} on {num_scored:,} tokens of training text, measured on {num_held_out:,} held-out tokens; "
        "scales calibrated on the former."
    )
    facts = (found.recipe, found.arm, ", ".join(found.formats))
    meta = tuple(printable(fact) for fact in facts)
    verdict = Verdict(tuple(chips), printable(sentence_case(found.answer)), condition=condition)
    return Document(name, "sensitivity", meta, verdict, sections, {})


def curve_figure(found: Sensitivity) -> Figure:
    """Average bits of a weight against the cost that remains."""
    names = ["", *(in_short(group.linears) for group in found.groups)]
    rows = [
        (point.bits, point.num_kept, 100 * point.share, point.nats, name)
        for point, name in zip(found.curve, names, strict=True)
    ]
    whole = found.curve[0].nats
    half = next(point for point in found.curve if point.nats <= whole / 2)
    title = (
        f"Half of the cost is gone with {half.num_kept} of {len(found.groups)} groups, "
        f"{100 * half.share:.3g}% of the weights, in BF16"
    )
    return Figure(
        key="curve",
        title=title,
        caption="KL from the model without quantizers, nats a token, against the average bits of a weight, as groups are "
        "kept in BF16, those first that cost most for each weight. Dots and line: estimated. Squares: measured on held-out "
        "text, of everything quantized and of the choice.",
        drawings=draw("curve", title, lambda layout: _plot(layout, found)),
        tables=(table(("bits", "groups kept", "share %", "nats a token", "the last one kept"), rows),),
        legend=(Key("estimated", "●", "arm-0"), Key("measured", "■", "arm-1")),
    )


def curve_svg(found: Sensitivity) -> str:
    """The same as a file of its own."""
    wide = next(drawing for drawing in curve_figure(found).drawings if drawing.layout == WIDE.name)
    return standalone(wide.svg, style_sheet())


def _plot(layout: Layout, found: Sensitivity) -> Plot:
    figure = canvas(layout, CURVE_PX)
    axes: Any = figure.subplots()
    points = found.curve[:-1]  # with all kept nothing remains, which no logarithmic axis has
    axes.plot(
        [p.bits for p in points], [p.nats for p in points], color=arm_color(0), marker=arm_marker(0), markersize=4
    )
    measured = [(found.curve[0].bits, found.everything.nats)]
    if found.choice is not None:
        measured.append((found.curve[sum(group.kept for group in found.groups)].bits, found.choice.nats))
    bits, nats = zip(*measured, strict=True)
    axes.plot(bits, nats, color=arm_color(1), marker=arm_marker(1), linestyle="none", markersize=7)
    whole = found.curve[0].nats
    for group, point in zip(found.groups, points[1:], strict=False):
        if group.nats > ANNOTATED * whole and not layout.narrow:
            axes.annotate(
                printable(group.name), (point.bits, point.nats), (6, 3), textcoords="offset points", color=INK
            )
    scaled(axes, np.array([*(p.nats for p in points), *nats]))
    axes.set_xlabel("bits of a weight, on average")
    axes.set_ylabel("KL, nats a token")
    return Plot(figure, [(axes, 0)])
