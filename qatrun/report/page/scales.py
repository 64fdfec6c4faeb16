"""What the scale of a tensor stands for, against the amax that it meets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qatrun.records.diagnosis import ArmDiagnosis
from qatrun.report.page.content import ArmContent
from qatrun.report.page.curves import label_steps, logarithmic
from qatrun.report.page.figure import Figure, Key, Layout, Plot, arm_keys, draw, small_panels
from qatrun.report.page.series import step_bins
from qatrun.report.page.table import Table, printable, table
from qatrun.report.page.tensors import TensorStats
from qatrun.report.page.theme import BAD, INK, arm_color

PANEL_PX = 150
MAX_STEPS = 150  # of a tensor
COLUMNS = ("step", "amax", "amax that the scale stands for", "overshoot", "clip fraction")


def scale_figure(
    arm: ArmContent, stats: TensorStats, diagnosis: ArmDiagnosis | None, key: str, num_tensors: int
) -> Figure | None:
    """Amax and the scale's amax of an arm's worst tensors; None where no tensor has both.

    Args:
        diagnosis: of the arm; its worst tensors are the ones to draw.
        num_tensors: at most.
    """
    names, why = _worst(stats, diagnosis, num_tensors)
    tables = tuple(part for name in names if (part := _table(stats, name)).rows)
    if not tables:
        return None
    title = f"{printable(arm.name)}: amax against what the scale stands for, {why}"
    width = step_bins(stats.steps, MAX_STEPS).width
    return Figure(
        key=key,
        title=title,
        caption="Where the amax of the step (colour) is above the amax that the scale stands for (ink), the tensor is too "
        "large for its scale, shaded"
        + (f". Each point is the step with the largest overshoot of every {width:,}." if width > 1 else "."),
        drawings=draw(key, title, lambda layout: _plot(layout, arm, tables)),
        tables=tables,
        legend=(
            *arm_keys({"amax of the step": arm.index}),
            Key("amax that the scale stands for", "──", "plain"),
        ),
        group="tensor",
    )


def _worst(stats: TensorStats, diagnosis: ArmDiagnosis | None, num_tensors: int) -> tuple[Sequence[str], str]:
    named = [row.tensor for row in (diagnosis.worst_tensors if diagnosis else ()) if row.tensor in stats.names]
    if named:
        return named[:num_tensors], "those of the diagnosis"
    clips = np.nanmax(stats.clip_fraction, initial=0.0) > 0
    peaks = np.full(len(stats.names), -np.inf)
    np.fmax.at(peaks, stats.tensor, stats.clip_fraction if clips else stats.overshoot)
    order = [stats.names[place] for place in np.argsort(-peaks, kind="stable")[:num_tensors]]
    return order, f"the {len(order)} tensors that {'clip most' if clips else 'overshoot most'}"


def _table(stats: TensorStats, name: str) -> Table:
    """A row for each bin: its step with the largest overshoot."""
    rows = stats.of(name)
    rows = rows[np.isfinite(stats.overshoot[rows])]
    bins = step_bins(stats.steps[rows], MAX_STEPS)
    by_size = rows[np.argsort(stats.overshoot[rows], kind="stable")]
    picked = np.full(len(bins), -1)
    picked[bins.index(stats.steps[by_size])] = by_size  # of several in a bin the last one stays
    picked = picked[picked >= 0]
    stands_for = stats.amax[picked] / np.where(stats.overshoot[picked] > 0, stats.overshoot[picked], np.nan)
    columns = (stats.steps, stats.amax, None, stats.overshoot, stats.clip_fraction)
    values = [stands_for if column is None else column[picked] for column in columns]
    return table(COLUMNS, zip(*values, strict=True), printable(name))


def _plot(layout: Layout, arm: ArmContent, tables: Sequence[Table]) -> Plot:
    titles = [part.caption for part in tables]
    figure, panels, lowest = small_panels(layout, titles, PANEL_PX, 20, "amax", sharex=True)
    for axes, part in zip(panels, tables, strict=True):
        _draw_tensor(axes, part, arm)
    for axes in lowest:
        label_steps(axes)
        axes.tick_params(labelbottom=True)
    return Plot(figure, [(axes, place) for place, axes in enumerate(panels)])


def _draw_tensor(axes: Any, part: Table, arm: ArmContent) -> None:
    steps, amax, stands_for = (np.array([row[place] for row in part.rows], dtype=np.float64) for place in range(3))
    axes.fill_between(steps, stands_for, amax, where=amax > stands_for, color=BAD, alpha=0.22, linewidth=0, step="mid")
    axes.plot(steps, amax, color=arm_color(arm.index), linewidth=1.2, drawstyle="steps-mid")
    axes.plot(steps, stands_for, color=INK, linewidth=1.2, drawstyle="steps-mid")
    both = np.concatenate([amax, stands_for])
    logarithmic(axes.yaxis, both[np.isfinite(both) & (both > 0)])
