"""Symmetric INT8: the integers -127..127, rounded half to even.

-128 is no value of the grid, which keeps the grid symmetric, so its code is free to stand for NaN: an integer format
has no other way to keep a NaN visible, and turning it into a number would hide it.

Source: Jacob et al., arXiv:1712.05877, in the symmetric form that weights use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatrun.formats import FORMATS
from qatrun.numerics.grid import Grid

_NAN_CODE = -128


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


INT8 = Integers(FORMATS["int8"])
