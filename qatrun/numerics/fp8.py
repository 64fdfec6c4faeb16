"""OCP FP8: E4M3 (fn) for values, E5M2 for range.

Both are small IEEE floats. With m mantissa bits and least normal exponent e_min, the spacing of the grid around x is

    ulp(x) = 2^(max(floor(log2 |x|), e_min) - m)

so rounding is `round(x / ulp) * ulp`, where round() is that of integers, half to even. Subnormals, zero and the sign of
zero need no case of their own. The exponent is read from the float32 pattern, and powers of two scale exactly, so the
only rounding is the one wanted. What this leaves to others: the range. Values past the largest are rounded as if the
grid went on.

E4M3 (fn) has no Inf and one NaN per sign; E5M2 has both as IEEE does. Casting to torch.float8_* would do the same in
eager mode, but not every GPU compiles it, and its answer to an overflow differs between the two types.

Source: OCP 8-bit Floating Point Specification (OFP8), revision 1.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MANTISSA_BITS = 23  # of float32, as is the bias
_BIAS = 127
_NAN_CODE = 0x7F  # the only one of E4M3, the last of E5M2's three
_MAGNITUDE = 0x7FFF_FFFF
_EXPONENT_FIELD = 0x7F80_0000


@dataclass(frozen=True)
class Minifloat:
    """Layout of a sign, `7 - mantissa_bits` exponent bits and `mantissa_bits` mantissa bits.

    Attributes:
        min_exponent: exponent of the least normal value.
        has_inf: the top exponent holds Inf and NaN (E5M2); without it only the very last code is special, a NaN (E4M3).
    """

    mantissa_bits: int
    min_exponent: int
    has_inf: bool

    @property
    def min_subnormal(self) -> float:
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def dropped_bits(self) -> int:
        """Mantissa bits that float32 has more."""
        return _MANTISSA_BITS - self.mantissa_bits

    @property
    def code_offset(self) -> int:
        """Difference of the two exponent biases, at the place of the code's exponent field."""
        return (self.min_exponent - 1 + _BIAS) << self.mantissa_bits

    @property
    def inf_code(self) -> int:
        """Top exponent, mantissa 0; Inf if the format has it."""
        return _NAN_CODE & -(1 << self.mantissa_bits)

    @property
    def last_number_code(self) -> int:
        return self.inf_code if self.has_inf else _NAN_CODE - 1


E4M3 = Minifloat(mantissa_bits=3, min_exponent=-6, has_inf=False)
E5M2 = Minifloat(mantissa_bits=2, min_exponent=-14, has_inf=True)


def round_minifloat(x: Tensor, layout: Minifloat) -> Tensor:
    """Round to the grid of a small float, ties to even, without an upper end.

    Args:
        x: any shape, float32.
        layout: E4M3 or E5M2.
    Returns:
        Shape of x, float32; a zero keeps its sign, Inf and NaN stay.
    """
    exponent_field = (x.view(torch.int32) & _EXPONENT_FIELD).clamp(min=(layout.min_exponent + _BIAS) << _MANTISSA_BITS)
    ulp_pattern = exponent_field - (layout.mantissa_bits << _MANTISSA_BITS)
    inv_ulp_pattern = (2 * _BIAS << _MANTISSA_BITS) - ulp_pattern
    return torch.round(x * inv_ulp_pattern.view(torch.float32)) * ulp_pattern.view(torch.float32)


def minifloat_spacing(value: float, layout: Minifloat) -> float:
    """Distance from a value of the grid, > 0, to the next larger one."""
    exponent = math.frexp(value)[1] - 1
    return 2.0 ** (max(exponent, layout.min_exponent) - layout.mantissa_bits)


def encode_minifloat(grid: Tensor, layout: Minifloat) -> Tensor:
    """Codes of values that are on the grid already, Inf and NaN included; every NaN becomes 0x7F.

    Args:
        grid: any shape, float32, values of the format's grid.
        layout: E4M3 or E5M2.
    Returns:
        Shape of grid, uint8.
    """
    pattern = grid.view(torch.int32)
    magnitude = grid.abs()
    normal = ((pattern & _MAGNITUDE) >> layout.dropped_bits) - layout.code_offset
    # Larger values are clipped to fit an int32; theirs is not the number that is used.
    subnormal = (magnitude * (1 / layout.min_subnormal)).clamp(max=2.0**layout.mantissa_bits).to(torch.int32)
    code = torch.where(magnitude < 2.0**layout.min_exponent, subnormal, normal)
    if layout.has_inf:
        code = torch.where(grid.isinf(), layout.inf_code, code)
    code = code + ((pattern >> 31) & 0x80)
    return torch.where(grid.isnan(), _NAN_CODE, code).to(torch.uint8)


def decode_minifloat(codes: Tensor, layout: Minifloat) -> Tensor:
    """Values of codes: `encode_minifloat` backwards.

    Args:
        codes: any shape, uint8.
        layout: E4M3 or E5M2.
    Returns:
        Shape of codes, float32.
    """
    signed = codes.to(torch.int32)
    code = signed & 0x7F
    normal = ((code + layout.code_offset) << layout.dropped_bits).view(torch.float32)
    magnitude = torch.where(code < 1 << layout.mantissa_bits, code * layout.min_subnormal, normal)
    if layout.has_inf:
        magnitude = torch.where(code == layout.inf_code, float("inf"), magnitude)
    magnitude = torch.where(code > layout.last_number_code, float("nan"), magnitude)
    return torch.where(signed < 0x80, magnitude, -magnitude)
