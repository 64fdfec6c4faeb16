"""Fake quantization: the rounding error of a format, inside a differentiable float computation.

Rounding is flat almost everywhere, so its true gradient is useless. The straight-through estimator (STE) passes the
gradient as if rounding were the identity. `ste="clipped"` passes it only where the value could still move on the grid:
past the edge, where x_hat does not depend on x at all, it is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatrun.formats import Format
from qatrun.numerics.grid import Grid, as_float32
from qatrun.numerics.grids import grid_of
from qatrun.numerics.scales import inverse_scale
from qatrun.scheme import Clip, Ste


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    format: str | Format,
    *,
    clip: Clip = "format",
    target_amax: float | None = None,
    ste: Ste = "identity",
    inv_scale: Tensor | None = None,
) -> Tensor:
    """Round x to the format's grid at the given scale, with a straight-through gradient.

        q = round_to_format(x * inv_scale), x_hat = q * scale        (float32, then cast to the dtype of x)

    Args:
        x: [..., d]; float32, bfloat16 or float16.
        scale: [] or broadcastable to x, float32; > 0; units of x per unit of the grid. It gets no gradient.
        format: a format or its name.
        clip: the edge at which values saturate: the format's largest value, or target_amax.
        target_amax: the grid value that amax is mapped to; needed for clip="target".
        ste: "identity": dx = dx_hat. "clipped": zero where x saturates, that is, where the grid, were it to go on past
            the edge, would have had a nearer value; what merely rounds down to the edge keeps its gradient.
        inv_scale: shape of scale; the stored reciprocal, computed by `inverse_scale` if not given.
    Returns:
        x_hat, shape and dtype of x.
    Raises:
        TypeError: x is of another dtype. InputError: unknown format. ValueError: clip="target" without a target_amax.
    Source: STE: Bengio et al., arXiv:1308.3432; the clipped form: Hubara et al., arXiv:1609.07061.
    """
    if clip == "target" and target_amax is None:
        raise ValueError("clip='target' needs target_amax")
    limit = target_amax if clip == "target" else None
    inv_scale = inverse_scale(scale) if inv_scale is None else inv_scale
    x_hat: Tensor = _FakeQuantize.apply(x, scale.detach(), inv_scale, grid_of(format), limit, ste)
    return x_hat


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, inv_scale: Tensor, grid: Grid, limit: float | None, ste: Ste
    ) -> Tensor:
        scaled = as_float32(x) * inv_scale
        if ste == "clipped":
            ctx.save_for_backward(grid.saturates(scaled, limit))
        return (grid.round(scaled, limit) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (grad,) = grads
        if ctx.saved_tensors:
            (saturated,) = ctx.saved_tensors
            grad = torch.where(saturated, 0.0, grad)
        return grad, None, None, None, None, None
