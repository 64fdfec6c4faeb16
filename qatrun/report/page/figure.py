"""A figure: drawn once for a desk or paper and once for a phone, with its numbers beside it."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine

from qatrun.report.page.svg import Picture, themed
from qatrun.report.page.table import Table, csv_text, elided
from qatrun.report.page.theme import NUM_ARM_COLORS, SETTINGS, arm_glyph


@dataclass(frozen=True)
class Layout:
    """Attributes:
    width: of the drawing in CSS pixels, at which text has its natural size.
    """

    name: str
    width: int

    @property
    def narrow(self) -> bool:
        return self.name == "narrow"


WIDE, NARROW = Layout("wide", 780), Layout("narrow", 358)


@dataclass(frozen=True)
class Panel:
    """Axes in which the pointer reads numbers, in the drawing's pixels.

    Attributes:
        table: which of the figure's tables it reads.
        low: x value at the left edge; `high` at the right.
        cells: first and last + 1 row of the figure's cells, for a heat map; None for a curve.
    """

    left: float
    right: float
    top: float
    bottom: float
    low: float
    high: float
    table: int = 0
    cells: tuple[int, int] | None = None


@dataclass(frozen=True)
class Plot:
    """What a figure's plotting function hands back.

    Attributes:
        axes: matplotlib axes that the pointer reads -> the table they show, or the rows of cells.
        titles: gid of an artist -> text shown when the pointer rests on it.
        pictures: axes, and the bitmaps (light, dark) that fill them.
    """

    canvas: Any
    axes: Sequence[tuple[Any, int | tuple[int, int]]] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    pictures: Sequence[tuple[Any, str, str]] = ()


@dataclass(frozen=True)
class Drawing:
    """Inline SVG, and its panels as JSON."""

    layout: str
    svg: str
    panels: str


@dataclass(frozen=True)
class Key:
    """One entry of a legend.

    Attributes:
        style: class of the style sheet that colours it.
    """

    label: str
    glyph: str
    style: str


@dataclass(frozen=True)
class Figure:
    """Attributes:
    key: names it in the page's addresses and is the stem of its CSV file.
    title: a sentence on what it shows.
    caption: how to read it.
    group: name of the CSV column that tells several tables apart.
    cells: numbers of a heat map for the pointer, as JSON; empty for other figures.
    """

    key: str
    title: str
    caption: str
    drawings: tuple[Drawing, ...]
    tables: tuple[Table, ...]
    legend: tuple[Key, ...] = ()
    group: str = ""
    cells: str = ""
    full: Table | None = None

    @property
    def csv(self) -> str:
        """Everything that is drawn."""
        return csv_text([self.full] if self.full else self.tables, "" if self.full else self.group)


def draw(key: str, title: str, plot: Callable[[Layout], Plot]) -> tuple[Drawing, ...]:
    """Both layouts of a figure.

    Args:
        plot: makes the matplotlib figure for a layout; called under the page's settings.
    """
    return tuple(_drawn(key, title, layout, plot) for layout in (WIDE, NARROW))


def canvas(layout: Layout, height: float) -> Any:
    """An empty matplotlib figure of that many CSS pixels: one point is one pixel at 72 dots an inch."""
    engine = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=4 / 72)
    return Canvas(figsize=(layout.width / 72, height / 72), layout=engine)


def small_panels(
    layout: Layout, titles: Sequence[str], panel_px: int, rest_px: int, ylabel: str, *, sharex: bool = False
) -> tuple[Any, list[Any], list[Any]]:
    """A panel for each title, side by side where there is room.

    Args:
        panel_px: height of a row of panels; `rest_px` of what is below the last.
    Returns:
        (figure, axes in the order of the titles, those of them that are the lowest of their column).
    """
    num_columns = 1 if layout.narrow or len(titles) == 1 else 2
    num_rows = -(-len(titles) // num_columns)
    figure = canvas(layout, panel_px * num_rows + rest_px)
    panels = figure.subplots(num_rows, num_columns, sharex=sharex, squeeze=False).ravel().tolist()
    for axes in panels[len(titles) :]:
        axes.remove()
    panels = panels[: len(titles)]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(elided(title, 44))
    for axes in panels[::num_columns]:
        axes.set_ylabel(ylabel)
    return figure, panels, panels[-num_columns:]


def arm_keys(names: Mapping[str, int]) -> tuple[Key, ...]:
    """Legend of arms.

    Args:
        names: arm -> its index.
    """
    return tuple(Key(name, arm_glyph(index), f"arm-{index % NUM_ARM_COLORS}") for name, index in names.items())


def _drawn(key: str, title: str, layout: Layout, plot: Callable[[Layout], Plot]) -> Drawing:
    prefix = f"{key}-{layout.name}"
    text = io.StringIO()
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": prefix}), warnings.catch_warnings():
        # Names in scripts that matplotlib's font lacks: the browser's font has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        made = plot(layout)
        made.canvas.savefig(text, format="svg", metadata={"Date": None})
    panels = [_panel(made.canvas, axes, what) for axes, what in made.axes]
    pictures = [_picture(made.canvas, *picture) for picture in made.pictures]
    svg = themed(text.getvalue(), prefix, title, made.titles, pictures)
    return Drawing(layout.name, svg, json.dumps([asdict(panel) for panel in panels]))


def _box(figure: Any, axes: Any) -> tuple[float, float, float, float]:
    """Left, right, top and bottom in pixels from the upper left corner."""
    box, height = axes.get_window_extent(), figure.bbox.height
    return round(box.x0, 2), round(box.x1, 2), round(height - box.y1, 2), round(height - box.y0, 2)


def _panel(figure: Any, axes: Any, what: int | tuple[int, int]) -> Panel:
    low, high = (float(limit) for limit in axes.get_xlim())
    table, cells = (what, None) if isinstance(what, int) else (0, what)
    return Panel(*_box(figure, axes), low, high, table, cells)


def _picture(figure: Any, axes: Any, light: str, dark: str) -> Picture:
    left, right, top, bottom = _box(figure, axes)
    return Picture(left, top, right - left, bottom - top, light, dark)
