"""INT8, rounded half to even.

Symmetric: the integers -127..127. -128 is no value of the grid, which keeps the grid symmetric, so its code is free to
stand for NaN: an integer format has no other way to keep a NaN visible, and turning it into a number would hide it.

With a zero-point z all 256 codes are numbers, code - z: the integers -128 - z..127 - z, at most 255 in magnitude and so
exact in bfloat16. NaN stays in the values, and has no code.

Source: Jacob et al., arXiv:1712.05877; the symmetric form is that of its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatrun.formats import FORMATS
from qatrun.numerics.grid import Grid, Overflow

_NAN_CODE = -128
_HALF_STEP = 0.5 + 2.0**-10  # both ends of a range may lie half a step past the grid, here as float32 rounds it


class Integers(Grid):
    """The integers up to the format's largest; codes are int8, NaN is -128."""

    code_dtype = torch.int8
    has_inf = False
    native = 3

    def round_unbounded(self, x: Tensor) -> Tensor:
        """Ties to even; no -0."""
        return 0.0 - (0.0 - torch.round(x))  # -0 becomes 0, and all else stays

    def spacing(self, value: float) -> float:
        return 1.0

    def encode(self, grid: Tensor) -> Tensor:
        return torch.where(grid.isnan(), float(_NAN_CODE), grid).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.where(codes == _NAN_CODE, float("nan"), codes.to(torch.float32))


class ShiftedIntegers(Integers):
    """The integers under a zero-point.

    Attributes:
        zero: the code of zero, -128..127, in float32; [] or one a row of what is rounded, [..., 1].
    """

    def __init__(self, zero: Tensor) -> None:
        super().__init__(FORMATS["int8"])
        self.zero = zero

    def round(self, x: Tensor, limit: float | None = None, overflow: Overflow = "saturate") -> Tensor:
        """Nearest values; float32 in and out. The only edges are those of the codes."""
        return self.round_unbounded(x).clamp(-128.0 - self.zero, 127.0 - self.zero)

    def saturates(self, x: Tensor, limit: float | None = None) -> Tensor:
        """Where x is further than half a step from what it becomes."""
        return (x - self.round(x)).abs() > _HALF_STEP

    def encode(self, grid: Tensor) -> Tensor:
        return (grid + self.zero).nan_to_num().to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32) - self.zero


INT8 = Integers(FORMATS["int8"])
