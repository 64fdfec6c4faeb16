"""From amax to scale: `scale = amax / target_amax`, the size of one grid unit, and its reciprocal.

Quantizing multiplies by the stored reciprocal instead of dividing, so that every backend agrees bit for bit. For the
same reason the two divisions here are done in float64: the quotient of two float32 numbers, rounded to float64 and then
to float32, is the correctly rounded one, also in a compiled GPU kernel, whose own float32 division may be an ulp off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatrun.numerics.grid import as_float32
from qatrun.scheme import ASYMMETRIC_STEPS, BLOCK_EXPONENTS, GRANULARITIES, Scheme

# Scale, its inverse, and the zero-point if there is one: float32, of one shape.
Fit = tuple[Tensor, Tensor, Tensor | None]

# Between these, a scale and its reciprocal are both normal float32 numbers: finite, and safe from flushing to zero.
_MIN_SCALE = 2.0**-126
_MAX_SCALE = 2.0**126
_MANTISSA = 0x007F_FFFF  # of a float32 pattern


def amax(x: Tensor, granularity: str) -> Tensor:
    """Largest magnitude of x; an Inf or NaN in x shows in it.

    Args:
        x: any shape for per_tensor, where an empty one has amax 0; a weight [out, in] for per_channel; activations
            [..., d] for per_token; d a multiple of the block for per_block.
        granularity: what shares one amax, by its name in `scheme.GRANULARITIES`.
    Returns:
        float32, of `Granularity.scale_shape`: []; of rows [..., 1]; of blocks [..., d / block].
    """
    values = x.detach()
    if (block := GRANULARITIES[granularity].block) is not None:
        blocks: Tensor = values.unflatten(-1, (-1, block))
        return blocks.abs().amax(dim=-1).to(torch.float32)
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
    previous: Tensor | float = 1.0,
    to_power_of_two: bool | Tensor = False,
) -> Tensor:
    """The scale that maps amax to target_amax.

    An amax that tells nothing (<= 0, Inf or NaN) keeps the previous scale.

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
    return torch.where(usable, fresh, previous)


def reach(x: Tensor, granularity: str) -> Tensor:
    """How far x reaches below zero and above it, [2, of `Granularity.scale_shape`] float32 >= 0; as `amax` else."""
    rows = GRANULARITIES[granularity].rows
    values = x.detach() if rows or x.numel() else x.new_zeros(1)
    least, largest = values.aminmax(dim=-1, keepdim=True) if rows else values.aminmax()
    return torch.stack([-least, largest]).clamp(min=0).to(torch.float32)


def affine_from_reach(
    reach: Tensor,
    scale: Tensor | float = 1.0,
    zero: Tensor | float = 0.0,
    to_power_of_two: bool | Tensor = False,
) -> tuple[Tensor, Tensor]:
    """(scale, zero-point) that map a range to the codes -128..127, and zero to one of them.

        scale = (below + above) / 255, zero = -128 + below / scale          rounded half to even

    Args:
        reach: [2, ...] float32, of the range, as the function of that name gives it.
        scale, zero: what both stay where the range tells nothing (empty, Inf or NaN).
        to_power_of_two: as of `scale_from_amax`.
    Returns:
        float32, each of the shape of reach[0].
    Source: the affine quantization of arXiv:1712.05877, section 2.1; in it, too, the range is widened to hold zero.
    """
    extent = reach.sum(0)
    scale = scale_from_amax(extent, ASYMMETRIC_STEPS, scale, to_power_of_two)
    fresh = (reach[0].double() / scale).to(torch.float32).round() - 128
    return scale, torch.where(extent.isfinite() & (extent > 0), fresh, zero)


def block_scale(amax: Tensor, largest_exponent: int) -> Tensor:
    """The power of two that maps the leading bit of each amax to 2^largest_exponent; shape of amax, float32.

    What then lies above the format's largest value saturates. 1 where amax tells nothing (0, Inf or NaN).

    Source: OCP Microscaling Formats (MX) v1.0, section 6.3; its E8M0 begins at 2^-127, this at 2^-126.
    """
    values = as_float32(amax)
    usable = values.isfinite() & (values > 0)
    exponent = torch.where(usable, values, 1.0).double().frexp().exponent - 1 - largest_exponent
    scale = torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent).clamp(_MIN_SCALE, _MAX_SCALE)
    return torch.where(usable, scale, 1.0).to(torch.float32)


def own_fit(x: Tensor, scheme: Scheme) -> Fit:
    """What fits this very tensor x [..., d], at the scheme's granularity."""
    if scheme.block is not None:
        scale, zero = block_scale(amax(x, scheme.granularity), BLOCK_EXPONENTS[scheme.format]), None
    elif scheme.symmetric:
        found = amax(x, scheme.granularity)
        scale, zero = scale_from_amax(found, scheme.target_amax, to_power_of_two=scheme.scaling.to_power_of_two), None
    else:
        found = reach(x, scheme.granularity)
        scale, zero = affine_from_reach(found, to_power_of_two=scheme.scaling.to_power_of_two)
    return scale, inverse_scale(scale), zero


def inverse_scale(scale: Tensor) -> Tensor:
    """The correctly rounded float32 reciprocal, shape of scale; finite for every scale of `scale_from_amax`."""
    return (1.0 / scale.detach().double()).to(torch.float32)
