"""The three passes over memory that a quantized linear is made of, each in one kernel.

    quantize            x -> grid values, amax, and what the clipped STE holds back
    rescale_            y * (row scale * column scale) + bias, in place
    scale_gradient      gradient * scale, zero where held back

On a CPU they run in C++ (`native.cpp`), on a GPU compiled by torch.compile; the plain functions below, the reference,
are what both must equal bit for bit, and what runs where neither can.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qatrun.formats import FORMATS, Format
from qatrun.numerics import native
from qatrun.numerics.rounding import quantize_to_grid, saturates
from qatrun.numerics.scales import amax

_FORMAT_NUMBERS = {"hif8": 0, "fp8_e4m3": 1, "fp8_e5m2": 2, "int8": 3}
Quantized = tuple[Tensor, Tensor, Tensor | None]


def quantize(
    x: Tensor, inv_scale: Tensor, spec: Format, limit: float | None, dtype: torch.dtype, *, with_mask: bool
) -> Quantized:
    """Round x to its grid; on the way take its amax and, if asked, the mask of what saturates.

    Args:
        x: [..., d] float32 or bfloat16.
        inv_scale: float32, [] or one a row of x, [..., 1].
        limit: clip at +-limit on the grid; None: at the format's own edge.
        dtype: of the grid values, which are exact in float32 and bfloat16.
    Returns:
        (q [..., d] in dtype, amax of x [] float32, saturated [..., d] bool or None).
    """
    if _in_native(x):
        return _quantize_native(x, inv_scale, spec, limit, dtype, with_mask)
    return _on_device(x, _quantize_reference)(x, inv_scale, spec.name, limit, dtype, with_mask)  # type: ignore[no-any-return]


def rescale_(y: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None) -> Tensor:
    """y * (row_scale * column_scale) + bias in float32, rounded once to the dtype of y, in place.

    Args:
        y: [..., n] float32 or bfloat16, contiguous.
        row_scale: float32, [] or [..., 1].
        column_scale: float32, [] or [n].
        bias: [n] or None.
    """
    if not _in_native(y):
        return y.copy_(_on_device(y, _rescale_reference)(y, row_scale, column_scale, bias))
    library = native.library()
    assert library is not None
    bias = None if bias is None else bias.to(y.dtype)
    columns = y.shape[-1]
    library.qatrun_rescale(
        native.pointer(y),
        native.DTYPES[y.dtype],
        ctypes.c_int64(y.numel() // columns),
        ctypes.c_int64(columns),
        native.pointer(row_scale),
        ctypes.c_int64(int(row_scale.numel() > 1)),
        native.pointer(column_scale),
        ctypes.c_int64(int(column_scale.numel() > 1)),
        native.pointer(bias),
    )
    return y


def scale_gradient(grad: Tensor, scale: Tensor, blocked: Tensor | None, dtype: torch.dtype) -> Tensor:
    """grad * scale in float32, zero where blocked, rounded once to dtype.

    Args:
        grad: any shape, float32 or bfloat16.
        scale: [] float32.
        blocked: shape of grad, bool, or None.
    """
    if not _in_native(grad):
        scaled: Tensor = _on_device(grad, _scale_gradient_reference)(grad, scale, blocked, dtype)
        return scaled
    library = native.library()
    assert library is not None
    out = torch.empty(grad.shape, dtype=dtype)
    library.qatrun_scale_gradient(
        native.pointer(grad),
        native.DTYPES[grad.dtype],
        ctypes.c_int64(grad.numel()),
        native.pointer(scale),
        native.pointer(blocked),
        native.pointer(out),
        native.DTYPES[dtype],
    )
    return out


def _quantize_native(
    x: Tensor, inv_scale: Tensor, spec: Format, limit: float | None, dtype: torch.dtype, with_mask: bool
) -> Quantized:
    library = native.library()
    assert library is not None
    q = torch.empty(x.shape, dtype=dtype)
    blocked = torch.empty(x.shape, dtype=torch.bool) if with_mask else None
    largest = torch.empty(())
    columns = x.shape[-1]
    library.qatrun_quantize(
        _FORMAT_NUMBERS[spec.name],
        native.pointer(x),
        native.DTYPES[x.dtype],
        ctypes.c_int64(x.numel() // columns),
        ctypes.c_int64(columns),
        native.pointer(inv_scale),
        ctypes.c_int64(int(inv_scale.numel() > 1)),
        ctypes.c_float(spec.max_finite if limit is None else limit),
        ctypes.c_float(saturation_threshold(spec.name, limit)),
        native.pointer(q),
        native.DTYPES[dtype],
        native.pointer(blocked),
        native.pointer(largest),
    )
    return q, largest, blocked


@cache
def saturation_threshold(format: str, limit: float | None) -> float:
    """The smallest float32 that saturates (see `saturates`), found by bisection over float32 patterns."""
    low, high = 0, 0x7F80_0000  # 0 does not saturate, Inf does
    while high - low > 1:
        middle = (low + high) // 2
        value = torch.tensor(middle, dtype=torch.int32).view(torch.float32)
        low, high = (low, middle) if saturates(value, FORMATS[format], limit) else (middle, high)
    return float(torch.tensor(high, dtype=torch.int32).view(torch.float32))


def _in_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in native.DTYPES and x.is_contiguous() and native.library() is not None


def _on_device(x: Tensor, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as it is on a CPU, compiled on a GPU."""
    return _compiled(reference) if x.device.type == "cuda" else reference


@cache
def _compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(reference, dynamic=True)


def _quantize_reference(
    x: Tensor, inv_scale: Tensor, format: str, limit: float | None, dtype: torch.dtype, with_mask: bool
) -> Quantized:
    q = quantize_to_grid(x, inv_scale, format, limit).to(dtype)
    blocked = saturates(x.detach().float() * inv_scale, format, limit) if with_mask else None
    return q, amax(x, "per_tensor"), blocked


def _rescale_reference(y: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None) -> Tensor:
    scaled = y.float() * (row_scale * column_scale)
    return (scaled if bias is None else scaled + bias.float()).to(y.dtype)


def _scale_gradient_reference(grad: Tensor, scale: Tensor, blocked: Tensor | None, dtype: torch.dtype) -> Tensor:
    scaled = grad.float() * scale
    return (scaled if blocked is None else torch.where(blocked, 0.0, scaled)).to(dtype)
