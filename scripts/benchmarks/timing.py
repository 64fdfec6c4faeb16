"""Interleaved timing. Machines drift (clocks, caches, neighbours), so contestants take turns and a ratio is taken within
each round, between measurements milliseconds apart; the median over rounds is the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class Progress(Protocol):
    """Who is told how far a benchmark is."""

    def begin(self, case: str, rounds: int) -> None:
        """A case with that many rounds begins."""

    def advance(self) -> None:
        """One round is done."""


@dataclass(frozen=True)
class Settings:
    """What all benchmarks are told.

    Attributes:
        device: "cpu" or "cuda".
        model: name of a shape in `arms.SHAPES`.
        quick: fewer cases and rounds.
        values: number of values of the kernel benchmark's tensor; None: the sizes of the device.
    """

    device: str
    model: str
    quick: bool
    values: int | None = None


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        value: median over rounds; a ratio to `reference` unless `unit` says otherwise.
        low, high: first and third quartile over rounds.
        n: number of rounds or processes, 1 for what is counted.
        absolute: median of the quantity itself, in `absolute_unit`: to check by, not to compare by.
    """

    benchmark: str
    case: str
    arm: str
    value: float
    low: float
    high: float
    n: int
    reference: str = ""
    unit: str = "ratio"
    absolute: float | None = None
    absolute_unit: str = "s"

    @property
    def key(self) -> str:
        return f"{self.benchmark}/{self.case}/{self.arm}"


def interleave(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: str, progress: Progress, inner: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, in which they come in an order of their own, so that all follow all.

    Args:
        contestants: name -> what is timed; each has been called before, so that nothing is compiled or allocated anew.
        inner: calls a measurement, for what is too short to time alone.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    order = Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            seconds[name].append(_time(contestants[name], device, inner))
        progress.advance()
    return seconds


def _time(run: Callable[[], object], device: str, inner: int) -> float:
    _wait_for(device)
    began = time.perf_counter()
    for _ in range(inner):
        run()
    _wait_for(device)
    return (time.perf_counter() - began) / inner


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rows_against(reference: str, seconds: Mapping[str, Sequence[float]], benchmark: str, case: str) -> list[Row]:
    """One row a contestant: the median over rounds of its time divided by the reference's of the same round."""
    base = np.asarray(seconds[reference])
    return [
        row_of(np.asarray(times) / base, benchmark, case, arm, reference=reference, absolute=float(np.median(times)))
        for arm, times in seconds.items()
    ]


def row_of(
    ratios: npt.NDArray[np.float64],
    benchmark: str,
    case: str,
    arm: str,
    *,
    reference: str,
    absolute: float,
    absolute_unit: str = "s",
) -> Row:
    """The row of one ratio a round."""
    low, middle, high = (float(value) for value in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return Row(
        benchmark,
        case,
        arm,
        middle,
        low,
        high,
        len(ratios),
        reference,
        absolute=absolute,
        absolute_unit=absolute_unit,
    )


def counted(
    benchmark: str, case: str, arm: str, value: float, *, reference: str, absolute: float, absolute_unit: str
) -> Row:
    """The row of something counted, which has no spread."""
    return Row(benchmark, case, arm, value, value, value, 1, reference, absolute=absolute, absolute_unit=absolute_unit)
