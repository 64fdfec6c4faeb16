"""Curves over the steps: the loss and its distance to the twin's, and what the model forgets of its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from qatrun.report.page.content import ArmContent
from qatrun.report.page.figure import Figure, Key, Layout, Plot, arm_keys, canvas, draw
from qatrun.report.page.series import Steps, Values, step_bins
from qatrun.report.page.table import printable, table
from qatrun.report.page.theme import BAD, MUTED, arm_color, arm_marker

Curve = tuple[Steps, Values]
LOG_FROM = 30.0  # largest over smallest value from which an axis that may be either is logarithmic
LINEAR_TO = 1.6  # below this even a logarithmic axis is linear


def loss_figure(arms: Sequence[ArmContent]) -> Figure | None:
    """Training loss of every arm, and below it the absolute percentage error against its twin's."""
    losses = {arm.name: curve for arm in arms if (curve := _curve(arm, "loss")) is not None}
    if not losses:
        return None
    apes = {
        arm.name: _ape(losses[arm.name], losses[arm.twin]) for arm in arms if arm.name in losses and arm.twin in losses
    }
    bins = step_bins(np.concatenate([steps for steps, _ in losses.values()]))
    loss_means = {name: bins.mean(*curve) for name, curve in losses.items()}
    ape_means = {name: bins.mean(*curve) for name, curve in apes.items()}
    title = _loss_title(arms, apes)
    columns = ("step", *(f"{name} loss" for name in losses), *(f"{name} APE %" for name in apes))

    def plot(layout: Layout) -> Plot:
        figure = canvas(layout, 300 if not ape_means else 420 if layout.narrow else 440)
        panels = figure.subplots(2 if ape_means else 1, 1, sharex=True, squeeze=False)[:, 0]
        for arm in arms:
            if arm.name in loss_means:
                _line(panels[0], bins.last, loss_means[arm.name], arm)
            if arm.name in ape_means:
                _line(panels[-1], bins.last, ape_means[arm.name], arm)
        panels[0].set_ylabel("loss, nats per token")
        if ape_means:
            panels[1].set_ylabel("APE against the twin, %")
            scaled(panels[1], np.concatenate(list(ape_means.values())))
        label_steps(panels[-1])
        mark_switch(panels, arms)
        return Plot(figure, [(axes, 0) for axes in panels])

    return Figure(
        key="loss",
        title=title,
        caption=f"{bins.describe('the mean')}APE: |loss of the arm − loss of its twin| / loss of the twin, at the same "
        "step on the same tokens; 0 up to the switch, which both share.",
        drawings=draw("loss", title, plot),
        tables=(table(columns, zip(bins.last, *loss_means.values(), *ape_means.values(), strict=True)),),
        legend=arm_keys({arm.name: arm.index for arm in arms if arm.name in losses}),
    )


def forgetting_figure(arms: Sequence[ArmContent], limit: float | None = None) -> Figure | None:
    """KL from the start model, and the rise of the loss on what it knew, quantizers off and on, at every probed step; None
    where no step was probed.

    Args:
        limit: nats a token from which the rise is an alarm; None: never.
    """
    curves = {
        (arm.name, state): curve
        for arm in arms
        for state in ("off", "on")
        if (curve := _curve(arm, f"kl_{state}")) is not None
    }
    if not curves:
        return None
    bins = step_bins(np.concatenate([steps for steps, _ in curves.values()]))
    means = {key: bins.mean(*curve) for key, curve in curves.items()}
    rises = {
        (arm.name, state): bins.mean(*curve)
        for arm in arms
        for state in ("off", "on")
        if (curve := _rise(arm, state)) is not None
    }
    title = _forgetting_title(curves)

    def plot(layout: Layout) -> Plot:
        figure = canvas(layout, 430 if rises else 270)
        panels = figure.subplots(2 if rises else 1, 1, sharex=True, squeeze=False)[:, 0]
        for arm in arms:
            for state, dashes in (("off", None), ("on", (3.5, 1.8))):
                if (arm.name, state) in rises:
                    _line(panels[0], bins.last, rises[arm.name, state], arm, dashes, marked=True)
                if (arm.name, state) in means:
                    _line(panels[-1], bins.last, means[arm.name, state], arm, dashes, marked=True)
        if rises:
            panels[0].set_ylabel("rise of the loss, nats")
            if limit is not None:
                _draw_limit(panels[0], limit)
        panels[-1].set_ylabel("KL, nats per token")
        scaled(panels[-1], np.concatenate(list(means.values())))
        label_steps(panels[-1])
        mark_switch(panels, arms)
        return Plot(figure, [(axes, 0) for axes in panels])

    probed = {arm.name: arm.index for arm in arms if (arm.name, "off") in curves or (arm.name, "on") in curves}
    states = (Key("quantizers off", "──", "plain"), Key("quantizers on", "╌╌", "plain"))
    return Figure(
        key="forgetting",
        title=title,
        caption=("Above: the rise of the loss on text that the start model knew. " if rises else "")
        + "KL(start model ‖ model now) on fixed held-out text. With quantizers off it is what training moved; the "
        f"gap between on and off is what quantizers add. {bins.describe('the mean')}",
        drawings=draw("forgetting", title, plot),
        tables=(
            table(
                (
                    "step",
                    *(f"{name} KL, quantizers {state}" for name, state in means),
                    *(f"{name} rise, quantizers {state}" for name, state in rises),
                ),
                zip(bins.last, *means.values(), *rises.values(), strict=True),
            ),
        ),
        legend=(*arm_keys(probed), *(states if any(state == "on" for _, state in curves) else ())),
    )


def teacher_figure(arms: Sequence[ArmContent]) -> Figure | None:
    """KL from the teacher of every arm that has one."""
    curves = {arm.name: curve for arm in arms if (curve := _curve(arm, "distill_kl")) is not None}
    if not curves:
        return None
    bins = step_bins(np.concatenate([steps for steps, _ in curves.values()]))
    means = {name: bins.mean(*curve) for name, curve in curves.items()}
    last = {name: float(values[np.isfinite(values)][-1]) for name, values in means.items()}
    farthest = max(last, key=last.__getitem__)
    title = f"{printable(farthest)} ends {last[farthest]:.3g} nats per token from its teacher"

    def plot(layout: Layout) -> Plot:
        figure = canvas(layout, 270)
        axes = figure.subplots()
        for arm in arms:
            if arm.name in means:
                _line(axes, bins.last, means[arm.name], arm)
        scaled(axes, np.concatenate(list(means.values())))
        axes.set_ylabel("KL, nats per token")
        label_steps(axes)
        mark_switch([axes], arms)
        return Plot(figure, [(axes, 0)])

    return Figure(
        key="teacher",
        title=title,
        caption=f"{bins.describe('the mean')}KL(teacher ‖ model) on the training text, logits of both over the "
        "temperature. It is a part of what is made small; the loss above is the cross-entropy alone.",
        drawings=draw("teacher", title, plot),
        tables=(table(("step", *(f"{name} KL" for name in means)), zip(bins.last, *means.values(), strict=True)),),
        legend=arm_keys({arm.name: arm.index for arm in arms if arm.name in curves}),
    )


def label_steps(axes: Any) -> None:
    """An x axis of optimizer steps."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def scaled(axes: Any, values: Values) -> None:
    """A linear axis from 0, or a logarithmic one where the values span too much; numbers written out on both."""
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) and np.percentile(positive, 98) > LOG_FROM * np.percentile(positive, 2):
        logarithmic(axes.yaxis, positive)
    else:
        axes.set_ylim(bottom=0.0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def logarithmic(axis: Any, positive: Values) -> None:
    """Make an x or y axis logarithmic, with enough numbers to be read; leave it linear where the values hardly differ."""
    span = float(positive.max() / positive.min()) if len(positive) else 1.0
    if span < LINEAR_TO:
        axis.set_major_locator(MaxNLocator(4))
    else:
        subdivisions = (1.0,) if span > 100 else (1.0, 2.0, 5.0) if span > 4 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log", nonpositive="mask")
        axis.set_major_locator(LogLocator(subs=subdivisions, numticks=100))
        axis.set_minor_locator(NullLocator())
        axis.set_label_text(f"{axis.get_label_text()} (log scale)".strip())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def mark_switch(panels: Sequence[Any], arms: Sequence[ArmContent]) -> None:
    """A line where fake quantization begins."""
    steps = sorted({arm.switch_step for arm in arms if arm.switch_step is not None})
    for place, step in enumerate(steps):
        for number, axes in enumerate(panels):
            axes.axvline(step, color=MUTED, linewidth=1.0, dashes=(2, 2), zorder=1)
            if number == 0:
                name = "switch to QAT" if len(steps) == 1 else f"switch, {step:,}"
                corner = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                axes.annotate(name, (step, 1.0), (4, -1 - 14 * place), **corner, va="top", color=MUTED)


def _curve(arm: ArmContent, key: str) -> Curve | None:
    metrics: Sequence[Mapping[str, Any]] = arm.metrics
    rows = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    if not rows:
        return None
    steps, values = zip(*rows, strict=True)
    return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)


def _rise(arm: ArmContent, state: str) -> Curve | None:
    """Of the loss on text that the start model knew, since then."""
    start, now = _curve(arm, "nll_start"), _curve(arm, f"nll_{state}")
    if start is None or now is None:
        return None
    common, here, there = np.intersect1d(now[0], start[0], assume_unique=True, return_indices=True)
    return common, now[1][here] - start[1][there]


def _draw_limit(axes: Any, limit: float) -> None:
    axes.axhline(limit, color=BAD, linewidth=1.0, dashes=(5, 2))
    corner = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(f"alarm above {limit:g}", (1.0, limit), (-2, 3), **corner, ha="right", va="bottom", color=BAD)


def _ape(curve: Curve, twin: Curve) -> Curve:
    """Steps that both have; percent."""
    common, here, there = np.intersect1d(curve[0], twin[0], assume_unique=True, return_indices=True)
    reference = twin[1][there]
    return common, 100.0 * np.abs(curve[1][here] - reference) / np.abs(reference)


def _line(
    axes: Any,
    steps: Steps,
    values: Values,
    arm: ArmContent,
    dashes: Sequence[float] | None = None,
    marked: bool = False,
) -> None:
    known = np.isfinite(values)
    style = {"dashes": dashes} if dashes else {}
    every = max(1, int(known.sum()) // (24 if marked else 6))
    axes.plot(
        steps[known], values[known], color=arm_color(arm.index), marker=arm_marker(arm.index), markevery=every, **style
    )


def _loss_title(arms: Sequence[ArmContent], apes: Mapping[str, Curve]) -> str:
    after = {
        arm.name: float(values[steps >= arm.switch_step].mean())
        for arm in arms
        if arm.name in apes and arm.switch_step is not None
        for steps, values in [apes[arm.name]]
    }
    if not after:
        return "Training loss of every arm"
    low, high = min(after, key=after.__getitem__), max(after, key=after.__getitem__)
    one = f"After the switch the training loss of {printable(high)} is {after[high]:.2g}% from its twin's on average"
    return one if low == high else f"{one}, of {printable(low)} {after[low]:.2g}%"


def _forgetting_title(curves: Mapping[tuple[str, str], Curve]) -> str:
    last = {key: float(values[-1]) for key, (_, values) in curves.items()}
    off = {name: value for (name, state), value in last.items() if state == "off"}
    if not off:
        return "How far each arm is from the start model"
    name = max(off, key=off.__getitem__)
    on = f", {last[name, 'on']:.3g} with quantizers on" if (name, "on") in last else ""
    most = "ends" if len(off) == 1 else "ends farthest from the start model:"
    return f"{printable(name)} {most} {off[name]:.3g} nats per token{on}" + (
        " from the start model" if len(off) == 1 else ""
    )
