"""The quantizer of one role: which scale a tensor gets, and its grid values in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatrun.formats import Role, get_format
from qatrun.numerics import Quantized, amax, clip_limit, codes_to_grid, inverse_scale, quantize, scale_from_amax
from qatrun.quant.plan import QuantPlan
from qatrun.quant.state import ScaleState
from qatrun.recipe import ResolvedRole


@dataclass(frozen=True)
class OnGrid:
    """A quantized tensor: x_hat = values * scale. Of values and codes, which say the same, one may be missing.

    Attributes:
        format: name of the format.
        values: [..., d] grid values in the compute dtype, where they are exact, or None.
        codes: [..., d] 8-bit codes, or None.
        scale: float32, [] or broadcastable to values.
        blocked: where the STE holds the gradient back, as bits (see `numerics.Quantized`); None: nowhere.
    """

    format: str
    values: Tensor | None
    codes: Tensor | None
    scale: Tensor
    blocked: Tensor | None

    @classmethod
    def of_saved(cls, format: str, saved: Tensor, scale: Tensor, blocked: Tensor | None) -> OnGrid:
        """Again from what a backward has kept."""
        values, codes = (saved, None) if saved.is_floating_point() else (None, saved)
        return cls(format, values, codes, scale, blocked)

    @property
    def saved(self) -> Tensor:
        """What a backward is to keep: codes if there are any, else values."""
        kept = self.values if self.codes is None else self.codes
        assert kept is not None
        return kept

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """The grid values in the compute dtype."""
        return codes_to_grid(self.saved, self.format, dtype) if self.values is None else self.values.to(dtype)


@dataclass(frozen=True)
class Quantizer:
    """Rounds the tensors of one role to their grid; without state, the same for all linears of a plan.

    Attributes:
        limit: clip at +-limit on the grid (`clip: target`), or None for the format's own edge.
        clipped_ste: whether the gradient of saturated values is held back.
    """

    spec: ResolvedRole
    limit: float | None
    clipped_ste: bool

    @classmethod
    def of_role(cls, role: Role, plan: QuantPlan) -> Quantizer:
        """The quantizer that a plan gives to a role."""
        spec = plan.roles[role]
        return cls(spec, clip_limit(plan.clip, spec.target_amax), plan.ste == "clipped")

    def own_scales(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, inv_scale), float32, of this very tensor x [..., d], at the quantizer's granularity."""
        scale = scale_from_amax(amax(x, self.spec.granularity), self.spec.target_amax)
        return scale, inverse_scale(scale)

    def takes_own_scale(self, state: ScaleState) -> bool:
        """Whether a scale comes from the tensor at hand: per channel and per token always, dynamic while training (a
        weight's also when frozen: it does not depend on the batch), and any scaled slot that has no history yet."""
        if self.spec.granularity != "per_tensor":
            return True
        if self.spec.scaling.type == "dynamic" and (state.training or self.spec.role == "weight"):
            return True
        return self.spec.scaling.type != "none" and not state.primed

    def to_grid(
        self,
        x: Tensor,
        scale: Tensor,
        inv_scale: Tensor,
        values: torch.dtype | None,
        *,
        codes: bool = False,
        takes_gradient: bool = False,
    ) -> tuple[OnGrid, Quantized]:
        """x [..., d] on its grid, and what the pass over x has seen.

        Args:
            values, codes: which of the two are wanted, values in which dtype.
            takes_gradient: whether the clipped STE is to say where it holds the gradient of x back.
        """
        blocked = self.clipped_ste and takes_gradient
        spec = get_format(self.spec.format)
        result = quantize(x, inv_scale, spec, self.limit, values=values, codes=codes, blocked=blocked)
        return OnGrid(spec.name, result.values, result.codes, scale, result.blocked), result
