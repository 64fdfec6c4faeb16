"""From the start model to what ships: tiles, a waterfall of accuracy, and every arm in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qatrun.records.values import Verdict
from qatrun.report.page.content import StudyContent
from qatrun.report.page.figure import Figure, Key, Layout, Plot, canvas, draw
from qatrun.report.page.table import (
    Cell,
    Table,
    Written,
    bounds,
    difference,
    percent,
    printable,
    sentence_case,
    signed,
    table,
    written,
)
from qatrun.report.page.theme import BAD, GOOD, INK, MUTED, WARN, arm_color
from qatrun.report.total import COLUMNS, LEGEND, Total, tiles, totals
from qatrun.text import readable_size

BAR_PX = 30


@dataclass(frozen=True)
class Tile:
    """One number that matters.

    Attributes:
        state: colours it: good, warn, bad or none.
    """

    what: str
    value: str
    more: str
    state: str = "none"


def ranked(content: StudyContent) -> tuple[Total, ...]:
    """The arms of a study, the best first."""
    return totals(content.pairs, content.diagnosed, {arm.name: arm.alarms for arm in content.arms})


def total_tiles(best: Total) -> tuple[Tile, ...]:
    """Of the arm that ranks first."""
    states = {"budget": best.state, "next": best.state}
    return tuple(
        Tile(
            what,
            printable(sentence_case(value).replace("`", "") if what in states else value),
            printable(more),
            states.get(what, "none"),
        )
        for what, value, more in tiles(best)
    )


def ranking_table(found: Sequence[Total]) -> Table:
    """Every arm, the best first, below the start model; the verdict beside the arm, where a phone shows it."""
    text = found[0].pair.comparison.perplexity
    start = percent(found[0].start), written(text.start if text else None, ".3f")
    rows: list[tuple[Cell, ...]] = [("start", None, None, start[0], None, None, None, start[1], None)]
    rows += [_ranked(total) for total in found]
    return table((COLUMNS[0], COLUMNS[-1], *COLUMNS[1:-1]), rows, sentence_case(LEGEND), "ranking")


def _ranked(total: Total) -> tuple[Cell, ...]:
    pair, training = total.pair, total.pair.comparison.training
    size = total.size_bytes
    return (
        *(pair.arm, total.answer, pair.format, percent(total.arm), difference(total.lost_pp)),
        None if training is None else bounds(training.ci95_pp),
        *(difference(total.quantization_pp), written(total.perplexity, ".3f")),
        None if size is None else Written(readable_size(size), {"bytes": size}),
    )


def waterfall_figure(content: StudyContent, found: Sequence[Total]) -> Figure | None:
    """Accuracy from the start model through training and quantization to what ships; None where the start was not scored."""
    known = [total for total in found if total.start is not None]
    if not known:
        return None
    indices = {arm.name: arm.index for arm in content.arms}
    best = known[0]
    title = (
        f"{printable(best.pair.arm)} ships with {percent(best.arm)} %, the start model had {percent(best.start)} %: "
        f"training {signed(-(best.training_pp or 0.0))} pp, quantization {signed(-best.quantization_pp)} pp"
    )
    rows = [
        (
            *(total.pair.arm, *(percent(value) for value in (total.start, total.twin, total.arm))),
            *(total.training_pp, total.quantization_pp),
        )
        for total in known
    ]
    columns = ("arm", "start %", "BF16 twin %", "shipped %", "lost by training pp", "lost by quantization pp")
    return Figure(
        key="waterfall",
        title=title,
        caption="Accuracy over all tasks together, in percent: what the start model had, what training took or gave, what "
        "quantization took or gave, and what ships. The axis begins where it is needed, not at 0.",
        drawings=draw("waterfall", title, lambda layout: _plot(layout, known, indices)),
        tables=(table(columns, rows),),
        legend=(
            *(Key("gained", "■", "good"), Key("lost, within its budget", "■", "muted")),
            *(Key("lost, inconclusive", "■", "warn"), Key("lost too much", "■", "bad")),
        ),
    )


def _plot(layout: Layout, known: Sequence[Total], indices: dict[str, int]) -> Plot:
    figure = canvas(layout, 56 + len(known) * (4 * BAR_PX + (22 if len(known) > 1 else 0)))
    panels = figure.subplots(len(known), 1, sharex=True, squeeze=False)[:, 0]
    values = [100 * value for total in known for value in (total.start or 0.0, total.twin, total.arm)]
    room = max(0.5, 0.25 * (max(values) - min(values)))
    for axes, total in zip(panels, known, strict=True):
        _draw(axes, total, indices.get(total.pair.arm, 0), min(values) - room)
        if len(known) > 1:
            axes.set_title(printable(total.pair.arm))
    panels[-1].set_xlim(max(0.0, min(values) - room), max(values) + 0.16 * (max(values) - min(values) + room))
    panels[-1].set_xlabel("accuracy, %")
    return Plot(figure)


def _color(gained: float, verdict: Verdict) -> str:
    """Red only for what is too much."""
    return GOOD if gained > 0 else {"within": MUTED, "inconclusive": WARN, "exceeds": BAD}[verdict]


def _draw(axes: Any, total: Total, index: int, low: float) -> None:
    start, twin, arm = (100 * value for value in (total.start or 0.0, total.twin, total.arm))
    trained = total.pair.comparison.training
    bars = [
        ("start", low, start, INK, f"{start:.2f}"),
        ("training", start, twin, _color(twin - start, trained.verdict if trained else "within"), signed(twin - start)),
        ("quantization", twin, arm, _color(arm - twin, total.verdict), signed(arm - twin)),
        ("shipped", low, arm, arm_color(index), f"{arm:.2f}"),
    ]
    for place, (_, begin, end, color, text) in enumerate(bars):
        axes.barh(place, end - begin, left=begin, height=0.62, color=color)
        axes.text(max(begin, end), place, f" {text}", va="center", color=INK)
    for place, level in enumerate((start, twin, arm)):
        axes.plot([level, level], [place, place + 1], color=MUTED, linewidth=0.8)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
