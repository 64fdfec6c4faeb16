"""Thousands of steps to the few hundred points that a figure can show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Steps = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

MAX_POINTS = 200


@dataclass(frozen=True)
class StepBins:
    """Runs of steps that a figure shows as one.

    Attributes:
        last: [num_bins] last step of each bin, rising.
        width: steps that a bin covers; 1 where every step has its own.
    """

    last: Steps
    width: int

    def __len__(self) -> int:
        return len(self.last)

    def index(self, steps: Steps) -> npt.NDArray[np.intp]:
        """[num_rows] bin of each step; every step must lie in one."""
        return np.searchsorted(self.last, steps)

    def mean(self, steps: Steps, values: Values) -> Values:
        """[num_bins] mean of the finite values of each bin; NaN where there is none."""
        known = np.isfinite(values)
        index = self.index(steps[known])
        counts = np.bincount(index, minlength=len(self))
        sums = np.bincount(index, weights=values[known], minlength=len(self))
        with np.errstate(invalid="ignore"):
            return sums / counts

    def describe(self, how: str) -> str:
        """A sentence on what a point stands for; empty where it is a single step."""
        return f"Each point is {how} of {self.width:,} steps, named by the last. " if self.width > 1 else ""


def step_bins(steps: Steps, max_bins: int = MAX_POINTS) -> StepBins:
    """Bins for these steps: the steps themselves where they are few enough, else runs of equal length."""
    distinct = np.unique(steps).astype(np.int64)
    if len(distinct) <= max_bins:
        return StepBins(distinct, 1)
    first, last = int(distinct[0]), int(distinct[-1])
    width = -(-(last - first + 1) // max_bins)
    return StepBins(np.minimum(np.arange(first + width - 1, last + width, width, dtype=np.int64), last), width)
