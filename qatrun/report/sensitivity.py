"""What each input group costs, as a table, and what to keep."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from qatrun.records.sensitivity import Sensitivity
from qatrun.report.grid import Grid

SHOWN = 16  # groups; all of them are in the CSV file


def sensitivity_table(found: Sensitivity) -> RenderableType:
    """sensitivity.json."""
    formats = ", ".join(found.formats)
    title = f"{found.arm} ({formats}), scored by {found.method} on {found.num_tokens[0]:,} tokens"
    table = Grid(title, "linears", "keep", "weights", "nats a token", "of all", "SQNR dB", "bits", "left")
    shown = max(SHOWN, sum(group.kept for group in found.groups))
    total = found.curve[0].nats or 1.0
    for group, point in zip(found.groups[:shown], found.curve[1:], strict=False):
        table.add_row(
            Text(in_short(group.linears)),
            Text("keep", "yellow") if group.kept else "",
            f"{100 * group.share:.1f}%",
            f"{group.nats:.6f}",
            f"{100 * group.nats / total:.1f}%",
            "" if group.sqnr_db is None else f"{group.sqnr_db:.1f}",
            f"{point.bits:.2f}",
            f"{point.nats:.6f}",
        )
    more = len(found.groups) - shown
    rest = [Text(f"... and {more} more, in report/groups.csv", "dim")] if more > 0 else []
    bits = Text(
        "bits, left: average of a weight, and what remains, once this group and those above it are in BF16", "dim"
    )
    return Group(table, *rest, bits, Text(), Text(found.answer))


def in_short(linears: Sequence[str]) -> str:
    """Linears of one group: the first in full, of the others what differs."""
    parent = linears[0].rpartition(".")[0]
    return ", ".join([linears[0], *(name.removeprefix(f"{parent}.") for name in linears[1:])])
