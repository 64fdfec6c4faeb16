"""HiFloat8: eight bits whose split between exponent and mantissa moves with the value.

A small exponent needs few bits, and what it does not use goes to the mantissa. A prefix code (the "dot" field) says how
many bits the magnitude of the exponent E takes; E is sign-magnitude and its leading one is implied:

    code (sign bit left out)   |E|      mantissa bits   values
    0000 MMM                   -        -               0 and the denormals 2^(M-23), M = 1..7
    0001 mmm                   0        3               1 .. 1.875
    001  s mmm                 1        3
    01   s e mmm               2..3     3               up to 15
    10   s ee mm               4..7     2               up to 224
    11   s eee m               8..15    1               up to 2^15; the last code, 1.5 * 2^15, means Inf

Precision is thus tapered: 3 mantissa bits for magnitudes in [1/8, 16), then 2, 1 and, for the denormals, which are bare
powers of two, 0. There is no -0: its code, 0x80, is the only NaN.

Rounding to the nearest value, ties away from zero, is an integer addition on the float32 pattern. Dropping the low k
bits of a pattern truncates the magnitude; adding half of the last kept bit first rounds it, ties up; a carry out of the
mantissa steps into the exponent, to the first value of the next binade, as it should. Only k depends on the band: 23
minus the mantissa bits of the table. At the lower end the format has its own rule: from 2^-23 on, everything short of
the denormals becomes the least of them, 2^-22. What this leaves to others is the upper end: past 2^15 the grid goes on
here, so that the caller can tell what overflowed.

Source: Luo et al., "Ascend HiFloat8 Format for Deep Learning", arXiv:2409.16626.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qatrun.formats import FORMATS
from qatrun.numerics.grid import Grid

_MAGNITUDE = 0x7FFF_FFFF
_MANTISSA_BITS = 23  # of float32, as is the bias
_BIAS = 127
_INFINITE = 0x7F80_0000
_BELOW_ZERO_ENDS = (-23 + _BIAS << _MANTISSA_BITS) - 1  # the largest pattern that becomes 0
_BINADES = (24 + _BIAS << _MANTISSA_BITS, 27 + _BIAS << _MANTISSA_BITS)  # of |E| up to 3, and from 16 on, times 2^23
_MIN_SUBNORMAL_PATTERN = (-22 + _BIAS) << _MANTISSA_BITS
_MIN_NORMAL_EXPONENT = -15
_INF_CODE = 0x6F
_NAN_CODE = 0x80


class HiFloat8(Grid):
    """The HiF8 grid; magnitudes below 2^-23 become +0, NaN has the code 0x80."""

    has_inf = True
    ties_away = True
    native = 0

    def round_unbounded(self, x: Tensor) -> Tensor:
        """Ties away from zero; a result above 2^15 is an overflow."""
        pattern = x.view(torch.int32)
        magnitude = pattern & _MAGNITUDE
        half = _half_of_last_kept_bit(magnitude)
        rounded = (magnitude + half).bitwise_and_(half.mul_(-2)).clamp_(min=_MIN_SUBNORMAL_PATTERN)
        # All ones where it holds, as the sign of a difference: a comparison or a choice takes torch as long as ten of these.
        is_nan = _INFINITE - magnitude >> 31
        is_nonzero = _BELOW_ZERO_ENDS - magnitude >> 31
        rounded.bitwise_or_(is_nan).bitwise_or_(pattern & ~_MAGNITUDE).bitwise_and_(is_nonzero)
        return rounded.view(torch.float32)

    def spacing(self, value: float) -> float:
        exponent = math.frexp(value)[1] - 1
        coarser = sum(abs(exponent) >= bound for bound in (4, 8, 16))
        return 2.0 ** (exponent - 3 + coarser)

    def encode(self, grid: Tensor) -> Tensor:
        """The bits of |E| and the three of the mantissa, read as one number, tell the band, and less its leading one
        (implied) and the mantissa bits that the band does not have, which are 0 on the grid, that number ends the code."""
        pattern = grid.view(torch.int32)
        exponent = (pattern >> _MANTISSA_BITS).bitwise_and_(0xFF).sub_(_BIAS)
        negative = exponent >> 31  # all ones where E < 0
        tail = (exponent.abs() << 3) | ((pattern >> 20) & 7)
        code = torch.where(tail < 64, 0x30 + (tail >> 1), 0x50 + (tail >> 2))
        code = torch.where(tail < 32, 0x10 + tail, code) + (negative & 0x10)
        code = torch.where(tail < 16, 0x08 + tail + (negative & 0x08), code)
        code = torch.where(exponent < _MIN_NORMAL_EXPONENT, (exponent + 23).clamp(min=0), code)
        code = torch.where(grid.isinf(), _INF_CODE, code) + ((pattern >> 31) & 0x80)
        return torch.where(grid.isnan(), _NAN_CODE, code).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        signed = codes.to(torch.int32)
        code = signed & 0x7F
        low = code & 0xF
        tail = torch.where(code < 0x60, (0x10 + low) << 1, (0x10 + low) << 2)
        tail = torch.where(code < 0x40, 0x10 + low, tail)
        tail = torch.where(code < 0x20, 0x08 + (code & 7), tail)
        tail = torch.where(code < 0x10, code & 7, tail)
        # `== 0`: compiled by torch 2.13 for AVX2, a choice by `!= 0` of int32 comes out the wrong way round.
        is_positive = torch.where(code < 0x20, code & 0x08, code & 0x10) == 0
        distance = tail >> 3
        exponent = torch.where(is_positive, distance, -distance)
        pattern = ((exponent + _BIAS) << _MANTISSA_BITS) | ((tail & 7) << 20)
        pattern = torch.where(code < 0x08, (code - 23 + _BIAS) << _MANTISSA_BITS, pattern)
        magnitude = torch.where(code == 0, 0.0, pattern.view(torch.float32))
        magnitude = torch.where(code == _INF_CODE, float("inf"), magnitude)
        values = torch.where(signed < 0x80, magnitude, -magnitude)
        return torch.where(signed == _NAN_CODE, float("nan"), values)


def _half_of_last_kept_bit(magnitude: Tensor) -> Tensor:
    """Half of the last mantissa bit that HiF8 keeps, in units of the last bit of a float32 pattern.

    Made a float32, |E| has for exponent what it takes: 4 .. 7, 8 .. 15 and all above are a binade each, and a mantissa
    bit less.
    """
    exponent = (magnitude & _INFINITE).sub_(_BIAS << _MANTISSA_BITS)  # E * 2^23
    binade = exponent.to(torch.float32).view(torch.int32) & _INFINITE  # 2^(23 + floor(log2 |E|))
    return binade.clamp_(*_BINADES).view(torch.float32).to(torch.int32) >> 5


HIF8 = HiFloat8(FORMATS["hif8"])
