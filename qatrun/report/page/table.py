"""Numbers as a table: on the page as a person reads them, in the CSV file as they are."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Cell = str | int | float | None

# A spreadsheet runs a cell that begins with one of these as a formula (OWASP, CSV injection).
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class Table:
    """Attributes:
    positions: [num_rows] where each row lies on the figure's x axis; None where its first cell says so.
    key: stem of the CSV file of a table that stands by itself; empty for one whose numbers are in a figure's file.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    positions: tuple[float, ...] | None = None
    key: str = ""


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", key: str = "") -> Table:
    """A table of plain Python cells; NumPy scalars are converted, NaN and null become empty."""
    return Table(tuple(columns), tuple(tuple(_plain(cell) for cell in row) for row in rows), caption, key=key)


def csv_text(tables: Sequence[Table], group: str = "") -> str:
    """Tables of the same columns as one CSV text.

    Args:
        group: name of a column in front that holds the captions; empty: no such column.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_guarded(name) for name in ([group] if group else []) + list(tables[0].columns)])
    for part in tables:
        front = [part.caption] if group else []
        writer.writerows([_guarded(cell) for cell in (*front, *row)] for row in part.rows)
    return text.getvalue()


def shown(cell: Cell) -> str:
    """A cell on the page: five significant digits, thousands separated, a dash for what is not known."""
    if cell is None:
        return "–"
    if isinstance(cell, int):
        return f"{cell:,}"
    return cell if isinstance(cell, str) else f"{cell:.5g}".replace("-", "−", 1 if cell < 0 else 0)


def signed(value: float, decimals: int = 2) -> str:
    """A difference: with its sign, and a minus that is as wide as a plus."""
    return f"{value:+.{decimals}f}".replace("-", "−")


def signed_range(interval: Sequence[float], decimals: int = 2) -> str:
    """An interval of differences."""
    return f"{signed(interval[0], decimals)} to {signed(interval[1], decimals)}"


def percent(fraction: float | None) -> str | None:
    """Two decimals, without the sign; None stays None."""
    return None if fraction is None else f"{100 * fraction:.2f}"


def printable(text: object) -> str:
    """A name from a model, a data set or a recipe, with control and direction characters made visible."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def elided(name: str, length: int) -> str:
    """The end of a long name: the beginning of a tensor's name is what all of them share."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def sentence_case(text: object) -> str:
    """Printable text with a capital in front."""
    shown = printable(text)
    return shown[:1].upper() + shown[1:]


def _plain(cell: object) -> Cell:
    value = cell.item() if hasattr(cell, "item") else cell
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, int | float):
        return value
    return printable(value)


def _guarded(cell: Cell) -> Cell:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell
