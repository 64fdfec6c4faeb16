"""What quantization did to a tensor, as numbers for a report: [] float32 tensors on the device of x."""

from __future__ import annotations

import torch
from torch import Tensor

from qatrun.formats import Format
from qatrun.numerics.rounding import as_float32, saturates


def sqnr_db(x: Tensor, x_hat: Tensor) -> Tensor:
    """Signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum (x - x_hat)^2), in dB; +Inf where nothing was lost."""
    signal = as_float32(x)
    noise = signal - as_float32(x_hat)
    return 10 * torch.log10(signal.square().sum() / noise.square().sum())


def underflow_fraction(x: Tensor, x_hat: Tensor) -> Tensor:
    """Share of all elements that were not zero and became zero, 0..1."""
    return ((x_hat == 0) & (x != 0)).to(torch.float32).mean()


def clip_fraction(x: Tensor, inv_scale: Tensor, format: str | Format, limit: float | None = None) -> Tensor:
    """Share of elements that saturate at the limit or, without one, at the format's largest value, 0..1.

    Args:
        x: [..., d]; float32, bfloat16 or float16.
        inv_scale: [] or broadcastable to x, float32.
        format: a format or its name.
        limit: as in `round_to_format`.
    """
    return saturates(as_float32(x) * inv_scale, format, limit).to(torch.float32).mean()
