"""What a study came to, on one screen: verdict, total, every arm ranked, what is open, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from qatrun.report.grid import Flow, Grid
from qatrun.report.total import COLUMNS, LEGEND, Total, ranked_rows, tiles

STYLES = {"good": "green", "warn": "yellow", "bad": "red"}


def overview(ranked: Sequence[Total]) -> RenderableType:
    """The arms of a study, the best first; nothing where there is none."""
    if not ranked:
        return Text()
    best = ranked[0]
    parts: list[RenderableType] = [_headline(best, len(ranked)), *_tiles(best), Text(), _ranking(ranked)]
    parts.append(Text(LEGEND, style="dim"))
    return Group(*parts, *_open(ranked), Text.assemble(("next: ", "bold"), f"{best.pair.arm}: {best.next_step}"))


def _headline(total: Total, count: int) -> Text:
    pill = Text(f" {total.answer} ", style=f"bold reverse {STYLES[total.state]}")
    which = f" the best of {count} arms" if count > 1 else ""
    return Text.assemble("from start to what ships: ", (total.pair.arm, "bold"), which, " ", pill)


def _tiles(total: Total) -> Iterator[RenderableType]:
    shown = [tile for tile in tiles(total) if tile[0] not in ("budget", "next")]
    yield Flow([Text.assemble((what, "dim"), " ", (value, "bold"), f" ({more})") for what, value, more in shown])


def _ranking(ranked: Sequence[Total]) -> Grid:
    grid = Grid("", *COLUMNS)
    states = [None, *(total.state for total in ranked)]
    for row, state in zip(ranked_rows(ranked), states, strict=True):
        grid.add_row(*(Text(cell) for cell in row[:-1]), Text(row[-1], style=STYLES[state] if state else ""))
    return grid


def _open(ranked: Sequence[Total]) -> Iterator[Text]:
    """What nobody should take for shown."""
    for total in ranked:
        for phrase in total.hidden:
            yield Text(f"{total.pair.arm}: not shown: {phrase}", style="yellow")
