"""A table whose numbers are never cut: where it is too wide long names are folded, and where that is not enough each row
becomes a paragraph of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

LEFT_ALIGNED = frozenset(
    {
        "task",
        "metric",
        "verdict",
        "arm",
        "contrast",
        "answer",
        "lost",
        "from",
        "to",
        "source",
        "per seed",
        "study",
        "arms",
    }
    | {"linears", "keep", "tensor", "advice"}
)
# Names: anywhere, down to so many columns.
FOLDED = frozenset({"task", "arm", "contrast", "metric", "source", "study", "linears", "tensor"})
FOLDED_TO = 10
WRAPPED = frozenset({"answer", "per seed", "arms", "advice"})  # between words


class Grid:
    """Rows under column names, without lines; a renderable of Rich."""

    def __init__(self, title: str, *columns: str) -> None:
        self.title = title
        self.columns = columns
        self.rows: list[list[Text]] = []

    def add_row(self, *cells: str | Text) -> None:
        self.rows.append([cell if isinstance(cell, Text) else Text(cell) for cell in cells])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self._widths(options.max_width)
        if widths is not None:
            yield self._table(widths)
            return
        if self.title:
            yield Text(self.title, style="bold")
        for row in self.rows:
            yield row[0]
            cells = zip(self.columns[1:], row[1:], strict=True)
            yield Flow([Text.assemble((name, "dim"), " ", cell) for name, cell in cells if cell.plain])

    def _widths(self, available: int) -> list[int] | None:
        """Of each column; None where no table fits."""
        cells = [[row[i] for row in self.rows] for i in range(len(self.columns))]
        widths = [max(map(_width, (Text(name), *cells[i]))) for i, name in enumerate(self.columns)]
        least = [_least_width(name, widths[i], cells[i]) for i, name in enumerate(self.columns)]
        available -= len(widths)  # a blank after each
        if sum(least) > available:
            return None
        while sum(widths) > available:
            spare = [width - smallest for width, smallest in zip(widths, least, strict=True)]
            widths[spare.index(max(spare))] -= 1
        return widths

    def _table(self, widths: Sequence[int]) -> Table:
        table = Table(
            title=Text(self.title, style="bold") if self.title else None,
            title_justify="left",
            box=None,
            padding=(0, 1, 0, 0),
            header_style="dim",
        )
        for name, width in zip(self.columns, widths, strict=True):
            justify = "left" if name in LEFT_ALIGNED else "right"
            table.add_column(Text(name), justify=justify, width=width, overflow="fold")  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*row)
        return table


class Flow:
    """Items on as many lines as they take, broken between them; an item longer than a line is broken between its words."""

    def __init__(self, items: Iterable[Text], indent: str = "  ", blank: str = "  ") -> None:
        self.items, self.indent, self.blank = items, indent, blank

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text(self.indent)
        for item in self.items:
            begun = len(line) > len(self.indent)
            if begun and line.cell_len + len(self.blank) + item.cell_len > options.max_width:
                yield line
                line, begun = Text(self.indent), False
            line.append(self.blank if begun else "").append_text(item)
        if len(line) > len(self.indent):
            yield line


def _width(cell: Text) -> int:
    return max((line.cell_len for line in cell.split()), default=0)


def _least_width(name: str, width: int, cells: Sequence[Text]) -> int:
    """What a column can do with: names are folded anywhere, texts between words, numbers never; headers
    between words, and in a word only where it is as long as the names of arms may be."""
    longest = max((Text(word).cell_len for word in name.split()), default=0)
    header = longest if longest <= FOLDED_TO else 0
    if name in FOLDED:
        return max(header, min(width, FOLDED_TO))
    if name in WRAPPED:
        return max((header, *(Text(word).cell_len for cell in cells for word in cell.plain.split())))
    return max((header, *map(_width, cells)))
