"""Values with intervals, one under another: scores, effects, seeds and contrasts are all drawn this way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qatrun.report.page.figure import Figure, Key, Layout, Plot, canvas, draw
from qatrun.report.page.table import Table, elided
from qatrun.report.page.theme import INK, MUTED, RULE, arm_color, arm_marker

ROW_PX, GROUP_GAP = 24, 0.55
WIDE_LABEL, NARROW_LABEL = 30, 46
DOTS_OFFSET = 0.27
SMALL_PX = 10.5


@dataclass(frozen=True)
class Mark:
    """One value of one arm, in the units of the x axis.

    Attributes:
        index: of the arm; None draws in ink.
        interval: None where none is known.
        dots: further values, the seeds one by one.
        text: the numbers, beside the mark where there is room.
        title: shown when the pointer rests on it.
    """

    value: float
    index: int | None
    interval: Sequence[float] | None = None
    dots: Sequence[float] = ()
    text: str = ""
    title: str = ""


@dataclass(frozen=True)
class Group:
    """Marks under one label.

    Attributes:
        detail: more about the label, in small.
        limit: a bound to draw across the marks, such as a budget.
    """

    label: str
    marks: Sequence[Mark] = field(default_factory=tuple)
    limit: float | None = None
    detail: str = ""


def forest(layout: Layout, groups: Sequence[Group], xlabel: str, *, zero: str | None = None) -> Plot:
    """Groups from top to bottom.

    Args:
        zero: where given, a line at 0, and what it means.
    """
    above = layout.narrow or any(len(group.label) > WIDE_LABEL for group in groups)
    head = 1.0 if above else 0.0
    rows = sum(len(group.marks) + head + GROUP_GAP for group in groups)
    figure = canvas(layout, 62 + ROW_PX * rows)
    axes = figure.subplots()
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    titles: dict[str, str] = {}
    ticks: list[tuple[float, Group]] = []
    y = 0.0
    for number, group in enumerate(groups):
        y += head
        for place, mark in enumerate(group.marks):
            _draw_mark(axes, mark, y + place, f"mark-{number}-{place}", titles, with_text=not layout.narrow)
        middle = y + (len(group.marks) - 1) / 2
        ticks.append((y - 1 if above else middle, group))
        if group.limit is not None:
            bounds = [y - 0.45, y + len(group.marks) - 0.55]
            axes.plot([group.limit] * 2, bounds, color=INK, linewidth=1.6, dashes=(2.5, 1.5))
        y += len(group.marks) + GROUP_GAP
    axes.set_ylim(y - GROUP_GAP - 0.35, -0.75)
    if zero is not None:
        axes.axvline(0.0, color=MUTED, linewidth=0.8, zorder=0)
        xlabel = f"{xlabel}\n{zero}" if layout.narrow else f"{xlabel}   ({zero})"
    axes.set_xlabel(xlabel)
    axes.margins(x=0.06)
    axes.grid(True, axis="x", color=RULE)
    _draw_labels(axes, ticks, NARROW_LABEL if layout.narrow else 3 * WIDE_LABEL if above else None)
    return Plot(figure, titles=titles)


def forest_figure(
    key: str,
    title: str,
    caption: str,
    groups: Sequence[Group],
    xlabel: str,
    numbers: Table,
    *,
    legend: tuple[Key, ...] = (),
    zero: str | None = None,
) -> Figure:
    """A figure of nothing but a forest."""
    drawings = draw(key, title, lambda layout: forest(layout, groups, xlabel, zero=zero))
    return Figure(key, title, caption, drawings, (numbers,), legend)


def _draw_mark(axes: Any, mark: Mark, y: float, gid: str, titles: dict[str, str], *, with_text: bool) -> None:
    color = INK if mark.index is None else arm_color(mark.index)
    marker = "o" if mark.index is None else arm_marker(mark.index)
    if mark.interval is not None:
        axes.plot(mark.interval, [y, y], color=color, linewidth=2, solid_capstyle="butt", gid=f"{gid}-interval")
    for number, dot in enumerate(mark.dots):
        axes.plot(dot, y + DOTS_OFFSET, "o", color=color, markersize=4, alpha=0.55, gid=f"{gid}-dot{number}")
        titles[f"{gid}-dot{number}"] = f"{dot:.4g}"
    axes.plot(mark.value, y, marker, color=color, markersize=8, gid=gid)
    if mark.text and with_text:
        place = axes.get_yaxis_transform()
        axes.text(1.015, y, mark.text, transform=place, va="center", color=INK)
    if mark.title:
        titles |= {gid: mark.title, f"{gid}-interval": mark.title}


def _draw_labels(axes: Any, ticks: Sequence[tuple[float, Group]], length: int | None) -> None:
    """Labels beside the axes, or where `length` is given, in that many characters above their marks."""
    axes.set_yticks([])
    for y, group in ticks:
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
        if length is not None:
            detail = f": {group.detail}" if group.detail else ""
            axes.text(0.0, y, elided(f"{group.label}{detail}", length), **place, color=INK)
            continue
        shift = 0.3 if group.detail else 0.0
        axes.text(-0.02, y - shift, elided(group.label, WIDE_LABEL), **place, ha="right", color=INK)
        axes.text(-0.02, y + shift, group.detail, **place, ha="right", color=MUTED, fontsize=SMALL_PX)
