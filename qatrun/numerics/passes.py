"""The passes over memory that a quantized linear is made of, each in one kernel.

    quantize            x -> grid values, their codes, amax and counts, and what the clipped STE holds back
    codes_to_grid       codes -> grid values
    rescale_            y * (row scale * column scale) + bias, in place
    scale_gradient      gradient * scale, zero where held back

On a CPU they run in C++ (`native.cpp`), on a GPU compiled by torch.compile; the plain functions at the end, the
reference, are what both must equal bit for bit, and what runs where neither can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qatrun.numerics import native
from qatrun.numerics.grid import Grid, as_float32
from qatrun.numerics.grids import GRIDS
from qatrun.numerics.int8 import ShiftedIntegers
from qatrun.numerics.scales import amax


class Quantized(NamedTuple):
    """What one pass over a tensor x [..., d] gives.

    Attributes:
        values: [..., d] grid values in float32 or bfloat16, where they are exact; None: not asked for.
        codes: [..., d] 8-bit codes of the same; None: not asked for.
        amax: [] float32, of x.
        counts: [2] int64: values that saturate, and values other than zero that become zero.
        blocked: [ceil(num_values / 8)] uint8, a bit a value, least significant first: where x saturates; None: not
            asked for.
    """

    values: Tensor | None
    codes: Tensor | None
    amax: Tensor
    counts: Tensor
    blocked: Tensor | None


def quantize(
    x: Tensor,
    inv_scale: Tensor,
    grid: Grid,
    limit: float | None,
    *,
    zero: Tensor | None = None,
    values: torch.dtype | None,
    codes: bool = False,
    blocked: bool = False,
) -> Quantized:
    """Round x to its grid, and take its amax and counts on the way.

    Args:
        x: [..., d] float32 or bfloat16.
        inv_scale: float32, [] or one a row of x, [..., 1].
        limit: clip at +-limit on the grid; None: at the format's own edge.
        zero: the zero-point of an INT8 tensor, shape of inv_scale; None: it is symmetric.
        values, codes, blocked: which results are wanted, values in which dtype.
    """
    x = x.detach().contiguous()
    per_row = (*x.shape[:-1], 1)
    native.check("inv_scale", inv_scale, torch.float32, (), per_row)
    kernels = _kernels_for((x, inv_scale), (x.dtype, values or x.dtype))
    if kernels is None or grid.native is None or zero is not None:
        reference: Callable[..., Quantized] = _on_device(x, _quantize_reference)
        return reference(x, inv_scale, grid.format.name, limit, values, codes, blocked, zero)
    result = Quantized(
        values=None if values is None else torch.empty(x.shape, dtype=values),
        codes=torch.empty(x.shape, dtype=grid.code_dtype) if codes else None,
        amax=torch.empty(()),
        counts=torch.empty(2, dtype=torch.int64),
        blocked=torch.empty(-(-x.numel() // 8), dtype=torch.uint8) if blocked else None,
    )
    kernels.quantize(
        grid.native,
        native.address(x),
        native.DTYPES[x.dtype],
        x.numel(),
        x.shape[-1] if inv_scale.dim() else x.numel(),
        native.address(inv_scale.contiguous()),
        int(inv_scale.dim() > 0),
        grid.edge(limit),
        grid.saturation_threshold(limit),
        native.address(result.values),
        native.DTYPES[values or torch.bfloat16],
        native.address(result.codes),
        native.address(result.blocked),
        native.address(result.amax),
        native.address(result.counts),
    )
    return result


def codes_to_grid(codes: Tensor, grid: Grid, dtype: torch.dtype, zero: Tensor | None = None) -> Tensor:
    """The grid values that codes of any shape stand for, in float32 or bfloat16; `zero` as of `quantize`."""
    native.check("codes", codes, grid.code_dtype, codes.shape)
    kernels = _kernels_for((codes,), (dtype,))
    if kernels is None or zero is not None:
        values: Tensor = _on_device(codes, _codes_to_grid_reference)(codes, grid.format.name, dtype, zero)
        return values
    out = torch.empty(codes.shape, dtype=dtype)
    kernels.decode(
        native.address(codes.contiguous()),
        codes.numel(),
        native.address(grid.values_of_codes()),
        native.address(out),
        native.DTYPES[dtype],
    )
    return out


def rescale_(y: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None) -> Tensor:
    """y * (row_scale * column_scale) + bias in float32, rounded once to the dtype of y, in place.

    Args:
        y: [..., n] float32 or bfloat16.
        row_scale: float32, [] or [..., 1].
        column_scale: float32, [] or [n].
        bias: [n] or None.
    """
    columns = y.shape[-1]
    native.check("row_scale", row_scale, torch.float32, (), (*y.shape[:-1], 1))
    native.check("column_scale", column_scale, torch.float32, (), (columns,))
    bias = None if bias is None else bias.detach().to(y.dtype)
    native.check("bias", bias, y.dtype, (columns,))
    kernels = _kernels_for((y, row_scale, column_scale, bias), (y.dtype,))
    if kernels is None or not y.is_contiguous():
        return y.copy_(_on_device(y, _rescale_reference)(y, row_scale, column_scale, bias))
    kernels.rescale(
        native.address(y),
        native.DTYPES[y.dtype],
        y.shape[:-1].numel(),
        columns,
        native.address(row_scale.contiguous()),
        int(row_scale.dim() > 0),
        native.address(column_scale.contiguous()),
        int(column_scale.dim() > 0),
        native.address(None if bias is None else bias.contiguous()),
    )
    return y


def scale_gradient(grad: Tensor, scale: Tensor, blocked: Tensor | None, dtype: torch.dtype) -> Tensor:
    """grad * scale in float32, zero where blocked, rounded once to dtype.

    Args:
        grad: any shape, float32 or bfloat16.
        scale: [] float32.
        blocked: bits as `quantize` gives them for a tensor of grad's shape, or None.
    """
    grad = grad.contiguous()
    native.check("scale", scale, torch.float32, ())
    native.check("blocked", blocked, torch.uint8, (-(-grad.numel() // 8),))
    kernels = _kernels_for((grad, scale, blocked), (grad.dtype, dtype))
    if kernels is None:
        scaled: Tensor = _on_device(grad, _scale_gradient_reference)(grad, scale, blocked, dtype)
        return scaled
    out = torch.empty(grad.shape, dtype=dtype)
    kernels.scale_gradient(
        native.address(grad),
        native.DTYPES[grad.dtype],
        grad.numel(),
        native.address(scale),
        native.address(None if blocked is None else blocked.contiguous()),
        native.address(out),
        native.DTYPES[dtype],
    )
    return out


def _kernels_for(tensors: Sequence[Tensor | None], dtypes: Iterable[torch.dtype]) -> native.Kernels | None:
    """The C++ kernels, if there are any and they take these tensors and dtypes."""
    if native.DTYPES.keys() >= set(dtypes) and all(map(native.is_plain, tensors)):
        return native.kernels()
    return None


def _on_device(x: Tensor, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as it is on a CPU, compiled on a GPU."""
    return _compiled(reference) if x.device.type == "cuda" else reference


@cache
def _compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(reference, dynamic=True)


def _quantize_reference(
    x: Tensor,
    inv_scale: Tensor,
    format: str,
    limit: float | None,
    values: torch.dtype | None,
    codes: bool,
    blocked: bool,
    zero: Tensor | None = None,
) -> Quantized:
    grid, scaled = _grid(format, zero), as_float32(x) * inv_scale
    rounded = grid.round(scaled, limit)
    saturated, underflowed = grid.saturates(scaled, limit), x.bool() & ~rounded.bool()
    return Quantized(
        values=None if values is None else rounded.to(values),
        codes=grid.encode(rounded) if codes else None,
        amax=amax(x, "per_tensor"),
        counts=torch.stack([saturated.count_nonzero(), underflowed.count_nonzero()]),
        blocked=pack_bits(saturated) if blocked else None,
    )


def _codes_to_grid_reference(codes: Tensor, format: str, dtype: torch.dtype, zero: Tensor | None = None) -> Tensor:
    return _grid(format, zero).decode(codes).to(dtype)


def _grid(format: str, zero: Tensor | None) -> Grid:
    return GRIDS[format] if zero is None else ShiftedIntegers(zero)


def _rescale_reference(y: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None) -> Tensor:
    scaled = y.float() * (row_scale * column_scale)
    return (scaled if bias is None else scaled + bias.float()).to(y.dtype)


def _scale_gradient_reference(grad: Tensor, scale: Tensor, blocked: Tensor | None, dtype: torch.dtype) -> Tensor:
    scaled = grad.float() * scale
    if blocked is not None:  # a mask of bits, as choosing takes torch long: all zeros where blocked
        passes = unpack_bits(blocked, grad).to(torch.int32).sub_(1)
        scaled = passes.bitwise_and_(scaled.view(torch.int32)).view(torch.float32)
    return scaled.to(dtype)


def pack_bits(mask: Tensor) -> Tensor:
    """[ceil(n / 8)] uint8 of n bools of any shape: value i in bit i % 8 of byte i // 8."""
    eights = F.pad(mask.flatten(), (0, -mask.numel() % 8)).view(torch.int64)
    return (eights * 0x0102_0408_1020_4080 >> 56).to(torch.uint8)  # brings bit 8k to bit 56 + k


def unpack_bits(bits: Tensor, like: Tensor) -> Tensor:
    """What `pack_bits` packed, 0 or 1 in uint8, in the shape of `like`."""
    eights = bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return eights.flatten()[: like.numel()].view(like.shape)
