"""Where the values of a trained model fall, over the grid of the format that has to hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.ticker import MaxNLocator

from qatrun.formats import FORMATS, get_format
from qatrun.numerics import decode
from qatrun.records.quantized import HistogramRecord
from qatrun.report.page.content import ArmContent
from qatrun.report.page.figure import Figure, Key, Layout, Plot, arm_keys, draw, small_panels
from qatrun.report.page.table import Table, printable
from qatrun.report.page.theme import INK, MUTED, arm_color

PANEL_PX = 190
GRID_SHARE = 0.4  # height of the grid's part, of that of the values


def histogram_figure(
    arm: ArmContent, key: str, num_tensors: int, of: str = "the trained model on held-out text"
) -> Figure | None:
    """Histograms of an arm's first `num_tensors` tensors; None where it has none of a format that is known.

    Args:
        of: whose values, in words.
    """
    found = [entry for entry in arm.histograms if entry.format in FORMATS and any(entry.counts)][:num_tensors]
    if not found:
        return None
    formats = ", ".join(dict.fromkeys(entry.format for entry in found))
    share = max(_share_above(entry) for entry in found)
    title = f"{printable(arm.name)} on the grid of {formats}: " + (
        f"up to {100 * share:.2g}% of a tensor's values lie beyond the grid"
        if share
        else "no value lies beyond the grid"
    )
    tables = tuple(_table(entry) for entry in found)
    return Figure(
        key=key,
        title=title,
        caption=f"|x| / scale of {of}, as powers of two. Upwards the share of the "
        "tensor's values in each bin, downwards how many values the grid has in that octave: where the grid thins out, so "
        "does precision. The line is the target that amax is mapped to, the dashed one the grid's largest value.",
        drawings=draw(key, title, lambda layout: _plot(layout, arm, found, tables)),
        tables=tables,
        legend=(
            *arm_keys({"values of the tensor": arm.index}),
            Key("values of the grid in each octave", "■", "muted"),
        ),
        group="tensor",
    )


@cache
def grid_magnitudes(name: str, target: float = 0.0) -> npt.NDArray[np.float64]:
    """Every positive finite value of a format, rising; in units of the grid. Integers go on to a target beyond it: the
    steps of an asymmetric tensor."""
    if target > get_format(name).max_finite:
        return np.arange(1.0, target + 1.0)
    codes = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    values = decode(codes.view(torch.int8) if name == "int8" else codes, name).double().numpy()
    return np.unique(values[np.isfinite(values) & (values > 0)])


def grid_counts(name: str, log2_edges: Sequence[float], target: float = 0.0) -> npt.NDArray[np.int64]:
    """[num_bins] values of the grid in the octave [2^k, 2^(k+1)) in which each bin begins."""
    octaves = np.floor(np.log2(grid_magnitudes(name, target))).astype(int)
    begins = np.floor(np.asarray(log2_edges[:-1])).astype(int)
    return np.array([np.count_nonzero(octaves == begin) for begin in begins], dtype=np.int64)


def _largest(entry: HistogramRecord) -> float:
    return max(get_format(entry.format).max_finite, entry.target_amax)


def _share_above(entry: HistogramRecord) -> float:
    """Share of the values in bins that begin at or above the grid's largest value."""
    edge = math.log2(_largest(entry))
    above = sum(count for low, count in zip(entry.log2_edges, entry.counts, strict=False) if low >= edge + 1e-9)
    return float(above / entry.num_values)


def _table(entry: HistogramRecord) -> Table:
    edges = [float(edge) for edge in entry.log2_edges]
    grid = grid_counts(entry.format, edges, entry.target_amax)
    rows = tuple(
        (f"2^{low:g}", f"2^{high:g}", int(count), 100.0 * count / entry.num_values, int(values))
        for low, high, count, values in zip(edges, edges[1:], entry.counts, grid, strict=False)
    )
    middles = tuple((low + high) / 2 for low, high in pairwise(edges))
    zeros = f"{100 * entry.num_zero / entry.num_values:.3g}% zeros"
    caption = f"{printable(entry.tensor)} ({entry.format}, {zeros})"
    return Table(("|x| / scale from", "to", "values", "share %", "grid values in the octave"), rows, caption, middles)


def _plot(layout: Layout, arm: ArmContent, found: Sequence[HistogramRecord], tables: Sequence[Table]) -> Plot:
    titles = [printable(entry.tensor) for entry in found]
    figure, panels, lowest = small_panels(layout, titles, PANEL_PX, 16, "values, %")
    for axes, entry, numbers in zip(panels, found, tables, strict=True):
        _draw_histogram(axes, entry, numbers, arm)
    for axes in lowest:
        axes.set_xlabel("|x| / scale")
    return Plot(figure, [(axes, place) for place, axes in enumerate(panels)])


def _draw_histogram(axes: Any, entry: HistogramRecord, numbers: Table, arm: ArmContent) -> None:
    """Shares upwards and the grid downwards, from one base line."""
    edges = np.array(entry.log2_edges, dtype=np.float64)
    shares, grid = (np.array([row[place] for row in numbers.rows], dtype=np.float64) for place in (3, 4))
    peak, most = shares.max(), max(1.0, grid.max())
    axes.stairs(shares, edges, fill=True, color=arm_color(arm.index), linewidth=0)
    axes.stairs(-GRID_SHARE * peak * grid / most, edges, fill=True, color=MUTED, linewidth=0)
    axes.axhline(0.0, color=MUTED, linewidth=0.8)
    axes.axvline(math.log2(entry.target_amax), color=INK, linewidth=1.0)
    axes.axvline(math.log2(_largest(entry)), color=INK, linewidth=1.0, dashes=(3, 2))
    upwards = MaxNLocator(3).tick_values(0.0, peak)
    upwards = upwards[upwards <= 1.02 * peak]
    axes.set_yticks([-GRID_SHARE * peak, *upwards], [f"grid {most:g}", *(f"{tick:g}" for tick in upwards)])
    axes.set_ylim(-1.1 * GRID_SHARE * peak, 1.08 * peak)
    shown = np.flatnonzero((shares > 0) | (grid > 0))
    low, high = edges[shown[0]], edges[shown[-1] + 1]
    axes.set_xlim(low - 0.5, high + 0.5)
    ticks = np.arange(math.ceil(low / 4) * 4, high + 0.1, 4)
    axes.set_xticks(ticks, [_power(tick) for tick in ticks])


def _power(exponent: float) -> str:
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"2{f'{exponent:g}'.translate(digits)}"
