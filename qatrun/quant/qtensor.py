"""A quantized tensor, and how a tensor becomes one under a scheme."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatrun.numerics import GRIDS, Fit, Grid, Quantized, codes_to_grid, quantize
from qatrun.scheme import Scheme


@dataclass(frozen=True)
class QTensor:
    """x_hat = values * scale. Of values and codes, which say the same, one may be missing.

    Attributes:
        values: [..., d] grid values in the compute dtype, where they are exact, or None.
        codes: [..., d] 8-bit codes, or None.
        scale: float32, of the granularity's `scale_shape`.
        blocked: where the STE holds the gradient back, as bits (see `numerics.Quantized`); None: nowhere.
        zero: float32, shape of scale: values = codes - zero; None: codes are the grid's own.
    """

    grid: Grid
    values: Tensor | None
    codes: Tensor | None
    scale: Tensor
    blocked: Tensor | None = None
    zero: Tensor | None = None

    @classmethod
    def of_saved(cls, grid: Grid, saved: Tensor, scale: Tensor, blocked: Tensor | None, zero: Tensor | None) -> QTensor:
        """Again from what a backward has `kept`."""
        values, codes = (saved, None) if saved.is_floating_point() else (None, saved)
        return cls(grid, values, codes, scale, blocked, zero)

    @property
    def saved(self) -> Tensor:
        """What a backward is to keep: codes if there are any, else values."""
        kept = self.values if self.codes is None else self.codes
        assert kept is not None
        return kept

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What `of_saved` needs."""
        return self.saved, self.scale, self.blocked, self.zero

    def values_in(self, dtype: torch.dtype) -> Tensor:
        """The grid values in the compute dtype."""
        return codes_to_grid(self.saved, self.grid, dtype, self.zero) if self.values is None else self.values.to(dtype)

    def operand(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a matrix product multiplies, [..., d] exact in that dtype, and the scale that is left outside: float32, []
        or one a row, [..., 1]. A product needs to know no more of how the tensor is scaled. Scales of blocks vary along the
        dimension that is summed, and are powers of two: they go into the matrix."""
        values = self.values_in(dtype)
        if self.scale.dim() == 0 or self.scale.shape[-1] == 1:
            return values, self.scale
        blocks = values.unflatten(-1, (self.scale.shape[-1], -1)) * self.scale.unsqueeze(-1)
        return blocks.flatten(-2).to(dtype), self.scale.new_ones(())

    def dequantized(self) -> Tensor:
        """x_hat, float32."""
        matrix, scale = self.operand(torch.float32)
        return matrix * scale


def to_grid(
    x: Tensor,
    scheme: Scheme,
    fit: Fit,
    values: torch.dtype | None,
    *,
    codes: bool = False,
    takes_gradient: bool = False,
) -> tuple[QTensor, Quantized]:
    """x [..., d] on its grid, and what the pass over x has seen.

    Args:
        fit: what it is scaled with, in the granularity of its scheme.
        values, codes: which of the two are wanted, values in which dtype.
        takes_gradient: whether the clipped STE is to say where it holds the gradient of x back.
    """
    grid, blocked, (scale, inv_scale, zero) = GRIDS[scheme.format], holds_back(scheme, takes_gradient), fit
    if scheme.block is not None:  # each block is a row
        x, inv_scale = x.unflatten(-1, (-1, scheme.block)), inv_scale.unsqueeze(-1)
    seen = quantize(x, inv_scale, grid, scheme.limit, zero=zero, values=values, codes=codes, blocked=blocked)
    made, made_codes = (
        part if part is None or scheme.block is None else part.flatten(-2) for part in (seen.values, seen.codes)
    )
    return QTensor(grid, made, made_codes, scale, seen.blocked, zero), seen


def holds_back(scheme: Scheme, takes_gradient: bool) -> bool:
    """Whether the gradient of saturated values is held back."""
    return scheme.ste == "clipped" and takes_gradient
