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
    """Without what is said beside it: formats that the arms are named after, one size that all have."""
    rows = ranked_rows(ranked)
    said = {"format": all(row[1] in row[0] for row in rows), "size": len({row[-2] for row in rows[1:]}) == 1}
    kept = [i for i, name in enumerate(COLUMNS) if not said.get(name)]
    grid = Grid("", *(COLUMNS[i] for i in kept))
    states = [None, *(total.state for total in ranked)]
    for row, state in zip(rows, states, strict=True):
        cells = [Text(row[i]) for i in kept]
        cells[-1].stylize(STYLES[state] if state else "")
        grid.add_row(*cells)
    return grid


def _open(ranked: Sequence[Total]) -> Iterator[Text]:
    """What nobody should take for shown."""
    for total in ranked:
        for phrase in total.hidden:
            yield Text(f"{total.pair.arm}: not shown: {phrase}", style="yellow")
