"""From amax to scale: `scale = amax / target_amax`, the size of one grid unit, and its reciprocal.

Quantizing multiplies by the stored reciprocal instead of dividing, so that every backend agrees bit for bit. For the
same reason the two divisions here are done in float64: the quotient of two float32 numbers, rounded to float64 and then
to float32, is the correctly rounded one, also in a compiled GPU kernel, whose own float32 division may be an ulp off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatrun.numerics.grid import as_float32
from qatrun.scheme import GRANULARITIES

# Between these, a scale and its reciprocal are both normal float32 numbers: finite, and safe from flushing to zero.
_MIN_SCALE = 2.0**-126
_MAX_SCALE = 2.0**126
_MANTISSA = 0x007F_FFFF  # of a float32 pattern


def amax(x: Tensor, granularity: str) -> Tensor:
    """Largest magnitude of x; an Inf or NaN in x shows in it.

    Args:
        x: any shape for per_tensor, where an empty one has amax 0; a weight [out, in] for per_channel; activations
            [..., d] for per_token.
        granularity: what shares one amax, by its name in `scheme.GRANULARITIES`.
    Returns:
        float32, of `Granularity.scale_shape`: []; of rows [..., 1].
    """
    values = x.detach()
    if not GRANULARITIES[granularity].rows:
        if values.numel() == 0:
            return values.new_zeros((), dtype=torch.float32)
        least, largest = (
            values.aminmax()
        )  # one pass and no copy of x, unlike abs().amax(); along a dim it is the slower one
        return torch.maximum(least.abs(), largest.abs()).to(torch.float32)
    return values.abs().amax(dim=-1, keepdim=True).to(torch.float32)


def scale_from_amax(
    amax: Tensor,
    target_amax: float | Tensor,
    previous: Tensor | None = None,
    to_power_of_two: bool | Tensor = False,
) -> Tensor:
    """The scale that maps amax to target_amax.

    An amax that tells nothing (<= 0, Inf or NaN) keeps the previous scale, 1 if there is none.

    Args:
        amax: any shape, float32.
        target_amax: > 0, a value of the format's grid; a tensor broadcastable to amax where entries differ.
        previous: broadcastable to amax, float32: the scales in use.
        to_power_of_two: whether the scale is rounded up to the next power of two, so that amax stays within the target; a
            bool tensor broadcastable to amax where entries differ.
    Returns:
        Shape of amax, float32, kept within 2^-126 .. 2^126 so that its reciprocal is finite and normal too.
    Source: the delayed-scaling rule of Transformer Engine, with the scale inverted to "size of a grid unit".
    """
    values = as_float32(amax)
    fresh = (values.double() / target_amax).clamp(_MIN_SCALE, _MAX_SCALE).to(torch.float32)
    # The mantissa, unless it is 0, carries into the exponent; 2^126, the largest, is a power of two itself.
    rounded_up = (fresh.view(torch.int32) + _MANTISSA & ~_MANTISSA).view(torch.float32)
    fresh = torch.where(torch.as_tensor(to_power_of_two, device=fresh.device), rounded_up, fresh)
    usable = values.isfinite() & (values > 0)
    return torch.where(usable, fresh, 1.0 if previous is None else previous)


def inverse_scale(scale: Tensor) -> Tensor:
    """The correctly rounded float32 reciprocal, shape of scale; finite for every scale of `scale_from_amax`."""
    return (1.0 / scale.detach().double()).to(torch.float32)
