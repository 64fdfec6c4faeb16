"""Symmetric INT8: the integers -127..127, rounded half to even.

-128 is no value of the grid, which keeps the grid symmetric, so its code is free to stand for NaN: an integer format
has no other way to keep a NaN visible, and turning it into a number would hide it. An asymmetric variant belongs beside
this one as a format of its own: it uses all 256 codes, and rounds like this one, its zero-point added before the clip.

Source: Jacob et al., arXiv:1712.05877, in the symmetric form that weights use.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAN_CODE = -128


def round_int8(x: Tensor) -> Tensor:
    """Round to integers, ties to even, without an end. float32 in and out; no -0; Inf and NaN stay."""
    return 0.0 - (0.0 - torch.round(x))  # -0 becomes 0, and all else stays


def encode_int8(grid: Tensor) -> Tensor:
    """int8 codes of float32 integers in -127..127; NaN becomes -128."""
    return torch.where(grid.isnan(), float(_NAN_CODE), grid).to(torch.int8)


def decode_int8(codes: Tensor) -> Tensor:
    """float32 values of int8 codes; -128 becomes NaN."""
    return torch.where(codes == _NAN_CODE, float("nan"), codes.to(torch.float32))
