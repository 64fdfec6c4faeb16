"""The quantizer of one role: which scale a tensor gets, and its grid values in one pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qatrun.formats import Role, get_format
from qatrun.numerics import amax, clip_limit, inverse_scale, quantize, scale_from_amax
from qatrun.quant.plan import QuantPlan
from qatrun.quant.state import ScaleState
from qatrun.recipe import ResolvedRole


@dataclass(frozen=True)
class OnGrid:
    """A quantized tensor: x_hat = values * scale.

    Attributes:
        values: [..., d] grid values in the compute dtype, where they are exact.
        scale: float32, [] or broadcastable to values.
        blocked: [..., d] bool, where the STE holds the gradient back; None: nowhere.
    """

    values: Tensor
    scale: Tensor
    blocked: Tensor | None


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

    def to_grid(self, x: Tensor, scale: Tensor, inv_scale: Tensor, dtype: torch.dtype) -> tuple[OnGrid, Tensor]:
        """x [..., d] on its grid in `dtype`, with the STE's mask if x takes a gradient; and x's amax, [] float32."""
        with_mask = self.clipped_ste and x.requires_grad
        values, seen, blocked = quantize(
            x, inv_scale, get_format(self.spec.format), self.limit, dtype, with_mask=with_mask
        )
        return OnGrid(values, scale, blocked), seen


class Latest:
    """Remembers the last tensor that was quantized and its result, so that the same tensor is not quantized twice.

    Linears that read one input share one of these, and each has one for its weight. A tensor is the same while it is the
    same object and unchanged in place.
    """

    def __init__(self) -> None:
        self._tensor: Callable[[], Tensor | None] = lambda: None
        self._circumstances: tuple[object, ...] = ()
        self._result: OnGrid | None = None

    def get(self, x: Tensor, make: Callable[[], OnGrid], *circumstances: object) -> OnGrid:
        """The result for x, made if it is not at hand; `circumstances` are what it depends on besides x."""
        circumstances = (x._version, x.requires_grad, *circumstances)
        if self._result is None or self._tensor() is not x or self._circumstances != circumstances:
            self._result = make()
            self._tensor, self._circumstances = weakref.ref(x), circumstances
        return self._result
