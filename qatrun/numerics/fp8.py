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

import torch
from torch import Tensor

from qatrun.formats import FORMATS, Format
from qatrun.numerics.grid import Grid

_MANTISSA_BITS = 23  # of float32, as is the bias
_BIAS = 127
_NAN_CODE = 0x7F  # the only one of E4M3, the last of E5M2's three
_MAGNITUDE = 0x7FFF_FFFF
_EXPONENT_FIELD = 0x7F80_0000


class Minifloat(Grid):
    """A sign, `7 - mantissa_bits` exponent bits and `mantissa_bits` mantissa bits; every NaN is encoded as 0x7F.

    Attributes:
        has_inf: the top exponent holds Inf and NaN (E5M2); without it only the very last code is special, a NaN (E4M3).
        min_exponent: exponent of the least normal value.
        dropped_bits: mantissa bits that float32 has more.
        code_offset: difference of the two exponent biases, at the place of the code's exponent field.
        inf_code: top exponent, mantissa 0; Inf if the format has it.
    """

    def __init__(self, format: Format, *, mantissa_bits: int, has_inf: bool, native: int) -> None:
        super().__init__(format)
        self.mantissa_bits, self.has_inf, self.native = mantissa_bits, has_inf, native
        self.min_exponent = round(math.log2(format.min_normal))
        self.dropped_bits = _MANTISSA_BITS - mantissa_bits
        self.code_offset = (self.min_exponent - 1 + _BIAS) << mantissa_bits
        self.inf_code = _NAN_CODE & -(1 << mantissa_bits)
        self.last_number_code = self.inf_code if has_inf else _NAN_CODE - 1

    def round_unbounded(self, x: Tensor) -> Tensor:
        """Ties to even; a zero keeps its sign."""
        least_exponent_field = (self.min_exponent + _BIAS) << _MANTISSA_BITS
        exponent_field = (x.view(torch.int32) & _EXPONENT_FIELD).clamp(min=least_exponent_field)
        ulp_pattern = exponent_field - (self.mantissa_bits << _MANTISSA_BITS)
        inv_ulp_pattern = (2 * _BIAS << _MANTISSA_BITS) - ulp_pattern
        return torch.round(x * inv_ulp_pattern.view(torch.float32)) * ulp_pattern.view(torch.float32)

    def spacing(self, value: float) -> float:
        exponent = math.frexp(value)[1] - 1
        return 2.0 ** (max(exponent, self.min_exponent) - self.mantissa_bits)

    def encode(self, grid: Tensor) -> Tensor:
        pattern = grid.view(torch.int32)
        magnitude = grid.abs()
        normal = ((pattern & _MAGNITUDE) >> self.dropped_bits) - self.code_offset
        # Larger values are clipped to fit an int32; theirs is not the number that is used.
        least = self.format.min_subnormal
        subnormal = (magnitude * (1 / least)).clamp(max=2.0**self.mantissa_bits).to(torch.int32)
        code = torch.where(magnitude < self.format.min_normal, subnormal, normal)
        if self.has_inf:
            code = torch.where(grid.isinf(), self.inf_code, code)
        code = code + ((pattern >> 31) & 0x80)
        return torch.where(grid.isnan(), _NAN_CODE, code).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        signed = codes.to(torch.int32)
        code = signed & 0x7F
        normal = ((code + self.code_offset) << self.dropped_bits).view(torch.float32)
        magnitude = torch.where(code < 1 << self.mantissa_bits, code * self.format.min_subnormal, normal)
        if self.has_inf:
            magnitude = torch.where(code == self.inf_code, float("inf"), magnitude)
        magnitude = torch.where(code > self.last_number_code, float("nan"), magnitude)
        return torch.where(signed < 0x80, magnitude, -magnitude)


FP8_E4M3 = Minifloat(FORMATS["fp8_e4m3"], mantissa_bits=3, has_inf=False, native=1)
FP8_E5M2 = Minifloat(FORMATS["fp8_e5m2"], mantissa_bits=2, has_inf=True, native=2)
