"""Rounding to a format's grid: the value domain, where quantized numbers stay floats.

The formats' own modules round as if the grid had no upper end. Here that end is put in: the format's largest finite
value, or a lower `limit`. Everything is computed in float32. The grids of all formats are exact in bfloat16 and in
float16, so casting the result to the dtype of the input loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from qatrun.formats import Format, get_format
from qatrun.numerics.fp8 import E4M3, E5M2, minifloat_spacing, round_minifloat
from qatrun.numerics.hif8 import hif8_spacing, round_hif8
from qatrun.numerics.int8 import round_int8

Overflow = Literal["saturate", "inf"]

_ROUND_UNBOUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "hif8": round_hif8,
    "fp8_e4m3": partial(round_minifloat, layout=E4M3),
    "fp8_e5m2": partial(round_minifloat, layout=E5M2),
    "int8": round_int8,
}
# Format -> distance from a value of the grid to the next larger one.
_SPACING: dict[str, Callable[[float], float]] = {
    "hif8": hif8_spacing,
    "fp8_e4m3": partial(minifloat_spacing, layout=E4M3),
    "fp8_e5m2": partial(minifloat_spacing, layout=E5M2),
    "int8": lambda _: 1.0,
}
_HAS_INF = frozenset({"hif8", "fp8_e5m2"})
_TIES_AWAY = frozenset({"hif8"})


def resolve_format(format: str | Format) -> Format:
    """The format itself, given it or its name."""
    return format if isinstance(format, Format) else get_format(format)


def as_float32(x: Tensor) -> Tensor:
    """x in float32, detached.

    Raises:
        TypeError: x is float64, which would be rounded twice, or no floating-point tensor.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"quantization takes float32, bfloat16 or float16 tensors, got {x.dtype}")
    return x.detach().to(torch.float32)


def round_to_format(
    x: Tensor, format: str | Format, *, overflow: Overflow = "saturate", limit: float | None = None
) -> Tensor:
    """Round x to the nearest value of the format's grid; not differentiable (see `fake_quantize`).

    HiF8 rounds ties away from zero, the others to even. Small negative values become -0 in FP8 and +0 in HiF8 and INT8,
    which have no -0.

    Args:
        x: any shape; float32, bfloat16 or float16; in units of the grid (that is, already divided by the scale).
        format: a format or its name.
        overflow: what becomes of values that round past the largest finite one, Inf included. "saturate": the largest
            finite value. "inf": Inf in formats that have it (HiF8, E5M2), else NaN.
        limit: magnitudes above it are clipped to it first; a value of the grid, such as target_amax. None: the
            format's own range is the only edge.
    Returns:
        Shape and dtype of x. NaN stays NaN.
    Raises:
        TypeError: x is of another dtype.
        InputError: unknown format.
    """
    spec = resolve_format(format)
    return bounded_round(as_float32(x), spec, overflow, limit).to(x.dtype)


def quantize_to_grid(x: Tensor, inv_scale: Tensor, format: str | Format, limit: float | None = None) -> Tensor:
    """The grid values q of x = q * scale, saturating: what a quantized matrix product multiplies.

        q = round_to_format(float32(x) * inv_scale)

    Args:
        x: [..., d]; float32, bfloat16 or float16.
        inv_scale: [] or broadcastable to x, float32; see `inverse_scale`.
        format: a format or its name.
        limit: as in `round_to_format`.
    Returns:
        Shape and dtype of x; exact in each of the three dtypes.
    """
    return bounded_round(as_float32(x) * inv_scale, resolve_format(format), "saturate", limit).to(x.dtype)


def saturates(x: Tensor, format: str | Format, limit: float | None = None) -> Tensor:
    """Where rounding x hits an edge: the grid, were it to go on, would have a nearer value than the one x becomes.

    A value a little above the edge that rounds to it anyway does not saturate; so the element that amax was taken from
    never does, even if its product with inv_scale lands an ulp above target_amax. NaN does not saturate, Inf does.

    Args:
        x: any shape, in units of the grid.
        format: a format or its name.
        limit: as in `round_to_format`.
    Returns:
        Shape of x, bool.
    """
    spec = resolve_format(format)
    edge = grid_edge(spec, limit)
    spacing = _SPACING[spec.name](edge)
    magnitude = as_float32(x).abs()
    tie_saturates = spec.name in _TIES_AWAY or edge / spacing % 2 == 1
    midpoint = edge + spacing / 2
    return magnitude >= midpoint if tie_saturates else magnitude > midpoint


def grid_edge(spec: Format, limit: float | None) -> float:
    """The largest magnitude that rounding gives."""
    return spec.max_finite if limit is None else min(limit, spec.max_finite)


def bounded_round(values: Tensor, spec: Format, overflow: Overflow, limit: float | None) -> Tensor:
    """`round_to_format` of float32 values."""
    if overflow == "saturate" or limit is not None:
        edge = grid_edge(spec, limit)
        values = values.clamp(-edge, edge)
    grid = _ROUND_UNBOUNDED[spec.name](values)
    if overflow == "saturate":
        return grid
    past_end = float("inf") if spec.name in _HAS_INF else float("nan")
    return torch.where(grid.abs() > spec.max_finite, torch.copysign(grid.new_full((), past_end), grid), grid)
