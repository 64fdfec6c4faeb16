"""Numbers as a table: on the page as a person reads them, in the CSV file as they are."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Written:
    """Numbers that a person reads as one text; in the CSV file each has a column of its own.

    Attributes:
        numbers: what stands behind the column's name there (nothing: the name alone) -> the number.
    """

    text: str
    numbers: Mapping[str, float | None]

    def __str__(self) -> str:
        return self.text


Cell = str | int | float | Written | None

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

    @property
    def words(self) -> frozenset[str]:
        """The columns that hold words, which begin at the left; numbers end at the right."""
        cells = {name: [row[place] for row in self.rows] for place, name in enumerate(self.columns)}
        return frozenset(name for name, of in cells.items() if any(isinstance(cell, str) for cell in of))


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
    columns = [
        (place, key, f"{name} {key}".strip())
        for place, name in enumerate(tables[0].columns)
        for key in _keys(row[place] for part in tables for row in part.rows)
    ]
    writer.writerow(map(_guarded, (*([group] if group else []), *(name for _, _, name in columns))))
    for part in tables:
        front = [part.caption] if group else []
        for row in part.rows:
            writer.writerow(map(_guarded, (*front, *(_number(row[place], key) for place, key, _ in columns))))
    return text.getvalue()


def shown(cell: Cell) -> str:
    """A cell on the page: five significant digits, thousands separated, a dash for what is not known."""
    if cell is None:
        return "–"
    if isinstance(cell, int):
        return f"{cell:,}"
    return str(cell) if isinstance(cell, str | Written) else f"{cell:.5g}".replace("-", "−", 1 if cell < 0 else 0)


def signed(value: float, decimals: int = 2) -> str:
    """A difference: with its sign, and a minus that is as wide as a plus."""
    return f"{value:+.{decimals}f}".replace("-", "−")


def signed_range(interval: Sequence[float], decimals: int = 2) -> str:
    """An interval of differences."""
    return f"{signed(interval[0], decimals)} to {signed(interval[1], decimals)}"


def percent(fraction: float | None) -> Written | None:
    """Two decimals, without the sign; None stays None."""
    return None if fraction is None else written(100 * fraction, ".2f")


def written(value: float | None, form: str) -> Written | None:
    """A number in a form of Python's; None stays None."""
    return None if value is None else Written(f"{value:{form}}", {"": value})


def difference(value: float | None, decimals: int = 2, unit: str = "") -> Written | None:
    """As `signed` writes it; None stays None."""
    return None if value is None else Written(signed(value, decimals) + unit, {"": value})


def bounds(interval: Sequence[float], decimals: int = 2, unit: str = "") -> Written:
    """As `signed_range` writes it."""
    low, high = interval
    return Written(signed_range(interval, decimals) + unit, {"low": low, "high": high})


def estimate(value: float, interval: Sequence[float], decimals: int = 2) -> Written:
    """A difference and its interval: `+0.91 [+0.25 to +1.59]`."""
    low, high = interval
    return Written(
        f"{signed(value, decimals)} [{signed_range(interval, decimals)}]", {"": value, "low": low, "high": high}
    )


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
    if value is None or isinstance(value, int | float | Written):
        return value
    return printable(value)


def _keys(cells: Iterable[Cell]) -> list[str]:
    """Of a column, what its numbers are told apart by in the file."""
    return list(dict.fromkeys(key for cell in cells if isinstance(cell, Written) for key in cell.numbers)) or [""]


def _number(cell: Cell, key: str) -> Cell:
    """What of a cell stands under a key."""
    if isinstance(cell, Written):
        return _plain(cell.numbers.get(key))
    return cell if not key else None


def _guarded(cell: Cell) -> Cell:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell
