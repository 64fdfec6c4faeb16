"""Saturation: every quantized tensor of an arm against the steps, as classes of colour."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator
from PIL import Image

from qatrun.report.page.content import ArmContent
from qatrun.report.page.figure import Figure, Key, Layout, Plot, canvas, draw
from qatrun.report.page.series import MAX_POINTS, StepBins, Values, step_bins
from qatrun.report.page.table import Table, elided, printable, table
from qatrun.report.page.tensors import TensorStats, block, role

MAX_CELLS = 240_000  # over all arms of a page; a cell costs the pointer's numbers 2.7 bytes
MAX_ROWS, MIN_COLUMNS = 600, 40
NUM_LISTED = 20
NAME_PX, LABEL_PX = 13, 16  # height of a row that holds a tensor's name, and between two blocks' numbers
ROLE_TITLES = {"input": "inputs", "weight": "weights", "grad_output": "output gradients"}

# Class 0 is "nothing"; the last index, no value, is transparent. The same colours are --heat-* of the style sheet.
# What is below the threshold of harm stays grey. Overshoot, which harms only where it clips, has blues of its own.
_CLIP_LIGHT = ("#edf0f2", "#dfe3e6", "#f9b24a", "#ee7f33", "#d1482f", "#9c2152", "#54104a")
_CLIP_DARK = ("#20242b", "#2b3038", "#8f3a96", "#c2456f", "#e8693f", "#f7a541", "#fdea95")
_OVER_LIGHT = ("#edf0f2", "#dfe3e6", "#cbd6df", "#b4c9da", "#8fb3d1", "#5d93c0", "#2b6ca3")
_OVER_DARK = ("#20242b", "#2b3038", "#2c3b4a", "#2d4a63", "#2f6088", "#3b7fb4", "#6db1e6")
LIGHT, DARK = (*_CLIP_LIGHT, *_OVER_LIGHT), (*_CLIP_DARK, *_OVER_DARK)
NUM_CLASSES = len(_CLIP_LIGHT)
NO_VALUE = len(LIGHT)


@dataclass(frozen=True)
class Measure:
    """What the colour stands for.

    Attributes:
        edges: upper bounds of the classes before the last.
        first: place of its colours among all.
    """

    column: str
    name: str
    edges: tuple[float, ...]
    labels: tuple[str, ...]
    first: int = 0

    def classes(self, values: Values) -> npt.NDArray[np.uint8]:
        """Class of each value, NO_VALUE for NaN."""
        found = self.first + np.searchsorted(np.array(self.edges), values, side="left")
        return np.where(np.isnan(values), NO_VALUE, found).astype(np.uint8)


CLIPPING = Measure(
    "clip_fraction",
    "share of values clipped",
    (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("none", "≤ 0.1%, harmless", "≤ 0.3%", "≤ 1%", "≤ 3%", "≤ 10%", "more"),
)
OVERSHOOT = Measure(
    "overshoot",
    "overshoot: amax now / amax that the scale stands for",
    (1.0, 2.0, 3.0, 4.0, 8.0, 16.0),
    ("≤ 1, fits", "≤ 2", "≤ 3", "≤ 4", "≤ 8", "≤ 16", "more"),
    NUM_CLASSES,
)


def heatmap_figure(arm: ArmContent, stats: TensorStats, key: str, num_arms: int) -> Figure:
    """The heat map of an arm that has statistics.

    Args:
        num_arms: heat maps on the page, which share MAX_CELLS.
    """
    clips, has_overshoot = np.nanmax(stats.clip_fraction, initial=0.0) > 0, np.isfinite(stats.overshoot).any()
    measure = CLIPPING if clips or not has_overshoot else OVERSHOOT
    num_rows = min(len(stats.names), MAX_ROWS)
    columns = int(np.clip(MAX_CELLS // (num_arms * num_rows), MIN_COLUMNS, MAX_POINTS))
    bins = step_bins(stats.steps, columns)
    grid = stats.largest(getattr(stats, measure.column), bins)
    kept = _kept_rows(grid)
    names, grid = [stats.names[row] for row in kept], grid[kept]
    title = _title(arm, measure, names, grid, bins)
    left_out = len(stats.names) - len(names)
    return Figure(
        key=key,
        title=title,
        caption=f"A row is a tensor, ordered by block; colour is the {measure.name}"
        + (" (no value is clipped at any step)" if measure is OVERSHOOT else "")
        + (f". Each column is the largest value in {bins.width:,} steps" if bins.width > 1 else "")
        + (f". The {left_out:,} tensors with the smallest values are left out" if left_out else "")
        + ". Measured from the switch on.",
        drawings=draw(key, title, lambda layout: _plot(layout, names, grid, bins, measure)),
        tables=(_worst_table(names, grid, bins, measure),),
        legend=tuple(Key(label, "■", f"heat-{place}") for place, label in enumerate(measure.labels, measure.first)),
        cells=_cells(names, grid, bins, measure),
        full=table(("tensor", *(f"step {step}" for step in bins.last)), zip(names, *grid.T, strict=True)),
    )


def _kept_rows(grid: Values) -> npt.NDArray[np.intp]:
    """All rows, or those with the largest values where they are too many; in their order."""
    if len(grid) <= MAX_ROWS:
        return np.arange(len(grid))
    return np.sort(np.argsort(-np.nan_to_num(np.fmax.reduce(grid, axis=1)), kind="stable")[:MAX_ROWS])


def _title(arm: ArmContent, measure: Measure, names: Sequence[str], grid: Values, bins: StepBins) -> str:
    row, column = divmod(int(np.nanargmax(grid)), grid.shape[1])
    tensor, step, value = printable(names[row]), int(bins.last[column]), float(grid[row, column])
    if measure is CLIPPING and value == 0:
        return f"{printable(arm.name)} clips nothing at any step"
    if measure is CLIPPING:
        return f"{printable(arm.name)} clips most in {tensor}: {100 * value:.2g}% of its values, step {step:,}"
    return f"{printable(arm.name)} clips nothing; the largest overshoot is {value:.2g}× in {tensor}, step {step:,}"


def _plot(layout: Layout, names: Sequence[str], grid: Values, bins: StepBins, measure: Measure) -> Plot:
    parts = _parts(names)
    row_px = float(np.clip(480 / len(names), 1.0, 14.0))
    heights = [max(18.0, row_px * (last - first)) for first, last in parts]
    figure = canvas(layout, sum(heights) + 27 * len(parts) + 36)
    panels = figure.subplots(len(parts), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    pictures = []
    for axes, (first, last), height in zip(panels, parts, heights, strict=True):
        kind = role(names[first])
        axes.set_title(f"{ROLE_TITLES.get(kind, kind or 'tensors')} ({last - first})")
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        # A column ends with its step: half a step more than the last, so that the pointer finds the right one.
        axes.set_xlim(0.0, len(bins))
        axes.set_ylim(last - first, 0)
        _label_rows(axes, names[first:last], height / (last - first), layout)
        pixels = measure.classes(grid[first:last])
        pictures.append((axes, _png(pixels, LIGHT), _png(pixels, DARK)))
    _label_steps(panels[-1], bins, layout)
    return Plot(figure, list(zip(panels, parts, strict=True)), pictures=pictures)


def _parts(names: Sequence[str]) -> list[tuple[int, int]]:
    """First and last + 1 row of each role."""
    starts = [row for row in range(len(names)) if row == 0 or role(names[row]) != role(names[row - 1])]
    return list(zip(starts, [*starts[1:], len(names)], strict=True))


def _label_rows(axes: Any, names: Sequence[str], row_px: float, layout: Layout) -> None:
    """Names where there is room for them, else the numbers of the blocks."""
    axes.tick_params(axis="y", length=0)
    starts: dict[int, int] = {}
    for row, name in enumerate(names):
        number = block(name)
        if number is not None:
            starts.setdefault(number, row)
    if row_px >= NAME_PX and (not starts or not layout.narrow):
        labels = [elided(printable(name).rpartition(":")[0], 20 if layout.narrow else 34) for name in names]
        axes.set_yticks(np.arange(len(names)) + 0.5, labels)
        return
    block_px = len(names) * row_px / max(1, len(starts))
    every = next((step for step in (1, 2, 4, 5, 10, 20, 50) if block_px * step >= LABEL_PX), 100)
    shown = {number: row for number, row in starts.items() if number % every == 0}
    axes.set_yticks([row + 0.5 for row in shown.values()], [str(number) for number in shown])
    if shown:
        axes.set_ylabel("block")


def _label_steps(axes: Any, bins: StepBins, layout: Layout) -> None:
    places = MaxNLocator(5 if layout.narrow else 8, integer=True).tick_values(int(bins.last[0]), int(bins.last[-1]))
    inside = [int(step) for step in places if bins.last[0] <= step <= bins.last[-1]]
    columns = np.searchsorted(bins.last, inside)
    axes.set_xticks(columns + 0.5, [f"{step:,}" for step in inside])
    axes.set_xlabel("optimizer step")


def _png(classes: npt.NDArray[np.uint8], palette: Sequence[str]) -> str:
    image = Image.fromarray(classes)
    image = image.convert("P") if image.mode != "P" else image
    image.putpalette(bytes.fromhex("".join(color.removeprefix("#") for color in (*palette, "#000000"))))
    data = io.BytesIO()
    image.save(data, format="PNG", transparency=NO_VALUE, optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def _worst_table(names: Sequence[str], grid: Values, bins: StepBins, measure: Measure) -> Table:
    peaks = np.nan_to_num(np.fmax.reduce(grid, axis=1))
    order = np.argsort(-peaks, kind="stable")[:NUM_LISTED]
    steps = bins.last[np.nanargmax(np.nan_to_num(grid, nan=-1.0), axis=1)]
    last = grid[:, -1]
    unit = 100.0 if measure is CLIPPING else 1.0
    word = "clipped %" if measure is CLIPPING else "overshoot ×"
    rows = [(names[row], unit * peaks[row], int(steps[row]), unit * last[row]) for row in order]
    return table(
        ("tensor", f"largest {word}", "at step", f"last {word}"),
        rows,
        f"the {len(rows)} tensors with the largest values",
    )


def _cells(names: Sequence[str], grid: Values, bins: StepBins, measure: Measure) -> str:
    """What the pointer reads: the upper half of each float32, that is, bfloat16."""
    high = (grid.astype("<f4").view("<u4") + 0x8000) >> 16
    values = np.where(np.isnan(grid), 0x7FC0, high).astype("<u2")
    unit = {"scale": 100.0, "suffix": "% clipped"} if measure is CLIPPING else {"scale": 1.0, "suffix": "× overshoot"}
    content = {
        "rows": [printable(name) for name in names],
        "steps": [int(step) for step in bins.last],
        "values": base64.b64encode(values.tobytes()).decode(),
        **unit,
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
