"""The code domain: quantized numbers as the 8-bit codes that hardware stores.

The two domains agree exactly: decode(encode(x)) equals round_to_format(x), and rounding x first changes no code. Both
directions are bit arithmetic rather than tables, which compiled code would have to carry to the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from qatrun.formats import Format
from qatrun.numerics.fp8 import E4M3, E5M2, decode_minifloat, encode_minifloat
from qatrun.numerics.hif8 import decode_hif8, encode_hif8
from qatrun.numerics.int8 import decode_int8, encode_int8
from qatrun.numerics.rounding import Overflow, as_float32, bounded_round, resolve_format

_ENCODE: dict[str, Callable[[Tensor], Tensor]] = {
    "hif8": encode_hif8,
    "fp8_e4m3": partial(encode_minifloat, layout=E4M3),
    "fp8_e5m2": partial(encode_minifloat, layout=E5M2),
    "int8": encode_int8,
}
_DECODE: dict[str, Callable[[Tensor], Tensor]] = {
    "hif8": decode_hif8,
    "fp8_e4m3": partial(decode_minifloat, layout=E4M3),
    "fp8_e5m2": partial(decode_minifloat, layout=E5M2),
    "int8": decode_int8,
}


def encode(x: Tensor, format: str | Format, *, overflow: Overflow = "saturate") -> Tensor:
    """Round x to the format's grid and return the codes.

    Args:
        x: any shape; float32, bfloat16 or float16; in units of the grid.
        format: a format or its name.
        overflow: as in `round_to_format`.
    Returns:
        Shape of x; uint8, for INT8 int8. NaN has one code: 0x80 in HiF8, 0x7F in FP8, -128 in INT8.
    Raises:
        TypeError: x is of another dtype.
        InputError: unknown format.
    """
    spec = resolve_format(format)
    return _ENCODE[spec.name](bounded_round(as_float32(x), spec, overflow, None))


def decode(codes: Tensor, format: str | Format) -> Tensor:
    """The values that codes stand for; every code of the format has one, NaN and Inf included.

    Args:
        codes: any shape; uint8, for INT8 int8.
        format: a format or its name.
    Returns:
        Shape of codes, float32; exact in bfloat16 and float16 too.
    Raises:
        InputError: unknown format.
    """
    return _DECODE[resolve_format(format).name](codes)
