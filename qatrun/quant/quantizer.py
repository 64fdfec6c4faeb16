"""The quantizer of one role: which scale a tensor gets, and its grid values in one pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
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

    @property
    def saved(self) -> Tensor:
        """What a backward is to keep: codes if there are any, else values."""
        kept = self.values if self.codes is None else self.codes
        assert kept is not None
        return kept

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """The grid values in the compute dtype."""
        return self.values if self.values is not None else grid_values(self.saved, self.format, dtype)


def grid_values(saved: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """Grid values, given them or their codes."""
    return saved if saved.dtype == dtype else codes_to_grid(saved, format, dtype)


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
        self, x: Tensor, scale: Tensor, inv_scale: Tensor, values: torch.dtype | None, *, codes: bool = False
    ) -> tuple[OnGrid, Quantized]:
        """x [..., d] on its grid, with the STE's mask if x takes a gradient; and what the pass over x has seen.

        Args:
            values, codes: which of the two are wanted, values in which dtype.
        """
        blocked = self.clipped_ste and x.requires_grad
        spec = get_format(self.spec.format)
        result = quantize(x, inv_scale, spec, self.limit, values=values, codes=codes, blocked=blocked)
        return OnGrid(spec.name, result.values, result.codes, scale, result.blocked), result


class Latest:
    """Remembers the last tensor that was quantized and its result, so that the same tensor is not quantized twice.

    Linears that read one input share one of these, and each has one for its weight. A tensor is the same while it is the
    same object and unchanged in place: what autograd's version counter sees, so not a write through `.data`, which is
    noticed after the next push only. A result lives no longer than its tensor; a copy of this starts empty.
    """

    def __init__(self) -> None:
        self._tensor: Callable[[], Tensor | None] = lambda: None
        self._circumstances: tuple[object, ...] = ()
        self._result: OnGrid | None = None

    def get(self, x: Tensor, make: Callable[[], OnGrid], *circumstances: object) -> OnGrid:
        """The result for x, made if it is not at hand; `circumstances` are what it depends on besides x."""
        if x.is_inference():  # it has no version counter
            return make()
        circumstances = (x._version, x.data_ptr(), x.requires_grad, *circumstances)
        if self._result is not None and self._tensor() is x and self._circumstances == circumstances:
            return self._result
        self._result = None  # before the new one is made, so that there are never two
        result = make()
        self._tensor, self._circumstances = weakref.ref(x, self._forget), circumstances
        self._result = result
        return result

    def _forget(self, _: object) -> None:
        self._result = None

    def __reduce__(self) -> tuple[type[Latest], tuple[()]]:
        return Latest, ()
