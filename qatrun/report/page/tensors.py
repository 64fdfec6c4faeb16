"""Statistics of quantized tensors as arrays, binned over the steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qatrun.formats import ROLES
from qatrun.report.page.series import StepBins, Steps, Values

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class TensorStats:
    """Rows of an arm's statistics.

    Attributes:
        names: tensors, inputs first, then weights and output gradients, each role in the order of the blocks.
        tensor: [num_rows] index into `names`.
        steps: [num_rows]; so are the rest, NaN where a value was not taken.
    """

    names: tuple[str, ...]
    tensor: npt.NDArray[np.int64]
    steps: Steps
    amax: Values
    overshoot: Values
    clip_fraction: Values

    @classmethod
    def from_table(cls, rows: Any) -> TensorStats:
        """From the pyarrow table of `ArmContent.tensors`; rows of steps without quantizers are left out."""
        rows = rows.filter(pc.or_(rows["overshoot"].is_valid(), rows["clip_fraction"].is_valid()))
        column = rows["tensor"].cast(pa.string()).combine_chunks().dictionary_encode()
        found = [str(name) for name in column.dictionary.to_pylist()]
        order = sorted(range(len(found)), key=lambda place: (*_place(found[place]), place))
        rank = np.empty(len(found), dtype=np.int64)
        rank[order] = np.arange(len(found))
        values = {name: rows[name].to_numpy().astype(np.float64) for name in ("amax", "overshoot", "clip_fraction")}
        steps = rows["step"].to_numpy().astype(np.int64)
        names = tuple(found[place] for place in order)
        return cls(names, rank[column.indices.to_numpy()] if found else np.empty(0, np.int64), steps, **values)

    def __len__(self) -> int:
        return len(self.steps)

    def largest(self, values: Values, bins: StepBins) -> Values:
        """[num_tensors, num_bins] largest value of each tensor in each bin; NaN where there is none."""
        grid = np.full((len(self.names), len(bins)), np.nan)
        np.fmax.at(grid, (self.tensor, bins.index(self.steps)), values)
        return grid

    def of(self, name: str) -> npt.NDArray[np.int64]:
        """Rows of a tensor in the order of the steps; empty where it is not known."""
        rows = np.flatnonzero(self.tensor == (self.names.index(name) if name in self.names else -1))
        return rows[np.argsort(self.steps[rows], kind="stable")]


def role(name: str) -> str:
    """Role of a tensor called `<linear>:<role>`; empty for another name."""
    return name.rpartition(":")[2] if ":" in name else ""


def block(name: str) -> int | None:
    """Number of the transformer block that a tensor belongs to: the first number in its name."""
    found = _BLOCK.search(name)
    return int(found.group(1)) if found else None


def _place(name: str) -> tuple[int, int]:
    order = ("input", "weight", "grad_output")
    assert set(order) == set(ROLES)
    number = block(name)
    return order.index(role(name)) if role(name) in order else len(order), -1 if number is None else number
