"""How step time and peak memory grow with layers, width, sequence length and micro-batches; and that the scale update
does not grow: a push is the same number of operations for 8 layers and for 64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arms import SHAPES, UNQUANTIZED, build_model, quantize_model, resized, trainee
from benchmarks.timing import Progress, Row, Settings, counted, interleave, rows_against
from benchmarks.worker import in_new_process

ARMS = (UNQUANTIZED, "hif8")
AXES = {
    "cpu": {
        "layers": (2, 4, 8, 16),
        "hidden": (256, 512, 768, 1024),
        "seq_len": (128, 256, 512, 1024),
        "micro_batches": (1, 2, 4, 8),
    },
    "cuda": {
        "layers": (4, 8, 16, 26),
        "hidden": (512, 1024, 1536, 2048),
        "seq_len": (512, 1024, 2048, 4096),
        "micro_batches": (1, 2, 4, 8),
    },
}
BATCH = 2  # sequences in a micro-batch, so that the longest fit
ROUNDS = 7
PUSHED_LAYERS = (8, 64)


def benchmark(settings: Settings, progress: Progress) -> list[Row]:
    """Time and memory at every point of each axis, and the power of x that they grow with; quick: the push alone."""
    rows = _push_rows(settings, progress)
    if settings.quick:
        return rows
    for axis, points in AXES[settings.device].items():
        progress.begin(f"scaling {axis}", len(points) * (ROUNDS + len(ARMS)))
        measured = [row for x in points for row in _point(axis, x, settings, progress)]
        rows += measured + _exponents(axis, measured)
    return rows


def _point(axis: str, x: int, settings: Settings, progress: Progress) -> list[Row]:
    changes = {"batch": BATCH} if axis == "micro_batches" else {"batch": BATCH, axis: x}
    shape = resized(SHAPES[settings.model], **changes)
    micro_batches = x if axis == "micro_batches" else 1
    arms = {arm: trainee(arm, shape, settings.device, bf16=True, micro_batches=micro_batches) for arm in ARMS}
    seconds = interleave({arm: made.step for arm, made in arms.items()}, ROUNDS, settings.device, progress)
    del arms
    memory = {}
    for arm in ARMS:
        memory[arm] = in_new_process(
            "peak",
            arm=arm,
            shape=shape,
            device=settings.device,
            bf16=True,
            checkpointing=False,
            micro_batches=micro_batches,
        )["bytes"]
        progress.advance()
    return rows_against(UNQUANTIZED, seconds, "scaling", f"time {axis}={x}") + [
        counted(
            "scaling",
            f"memory {axis}={x}",
            arm,
            value / memory[UNQUANTIZED],
            reference=UNQUANTIZED,
            absolute=value / 2**20,
            absolute_unit="MiB",
        )
        for arm, value in memory.items()
    ]


def _exponents(axis: str, measured: Sequence[Row]) -> list[Row]:
    """The b of `a * x^b`, fitted to each arm's times and memories over an axis."""
    rows = []
    for what in ("time", "memory"):
        for arm in ARMS:
            x, y = _series(measured, what, axis, arm)
            power = float(np.polyfit(np.log(x), np.log(y), 1)[0])
            rows.append(Row("scaling", f"{what} {axis}^b", arm, power, power, power, len(x), unit="exponent"))
    return rows


def _series(rows: Sequence[Row], what: str, axis: str, arm: str) -> tuple[list[int], list[float]]:
    """(x, absolute) of the points of an axis."""
    start = f"{what} {axis}="
    found = [row for row in rows if row.arm == arm and row.case.startswith(start)]
    return [int(row.case.removeprefix(start)) for row in found], [row.absolute or 0.0 for row in found]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw time and memory over every axis, both scales logarithmic, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(row.case.split()[1].removesuffix("^b") for row in rows if row.unit == "exponent"))
    figure = Figure(figsize=(3.2 * len(axes), 6), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False)
    exponent = {(row.case, row.arm): row.value for row in rows if row.unit == "exponent"}
    for column, axis in enumerate(axes):
        for line, (what, unit) in enumerate((("time", "s a step"), ("memory", "MiB at peak"))):
            panel = panels[line][column]
            measured: list[float] = []
            for arm in ARMS:
                x, y = _series(rows, what, axis, arm)
                measured += y
                panel.loglog(x, y, marker="o", label=f"{arm}: $x^{{{exponent[f'{what} {axis}^b', arm]:.2f}}}$")
            panel.set_xlabel(axis)
            panel.set_ylabel(unit)
            panel.set_xticks(x, [str(value) for value in x])
            ends = min(measured), max(measured)
            panel.set_yticks(ends, [f"{end:.3g}" if end < 100 else f"{end:,.0f}" for end in ends])
            panel.minorticks_off()
            panel.legend(fontsize="small", frameon=False)
    with mpl.rc_context({"svg.hashsalt": "qatrun"}):
        figure.savefig(path, metadata={"Date": None})


class _OperationCounter(TorchDispatchMode):
    """Counts the operations that reach a device's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _push_rows(settings: Settings, progress: Progress) -> list[Row]:
    progress.begin("scaling of a push", len(PUSHED_LAYERS))
    operations = {}
    for layers in PUSHED_LAYERS:
        model = build_model(resized(SHAPES["tiny"], layers=layers), settings.device)
        state = quantize_model(model, "hif8")
        assert state is not None
        state.scales.amax.fill_(1.0)
        state.push()  # takes up the scales, once
        with _OperationCounter() as counter:
            state.push()
        operations[layers] = counter.counts.total()
        progress.advance()
    few, many = PUSHED_LAYERS
    return [
        counted(
            "scaling",
            f"operations a push, {few} -> {many} layers",
            "hif8",
            operations[many] / operations[few],
            reference=f"{few} layers",
            absolute=operations[many],
            absolute_unit="operations",
        )
    ]
