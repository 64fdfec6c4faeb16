"""The fake-quantized linear: W8A8 arithmetic as a kernel does it, with a straight-through backward.

Forward, on grid values (exact in bfloat16 for all four formats), scales multiplied after:

    y = (q_x @ q_w^T) * (s_x * s_w) + b             accumulated in float32, rounded to the compute dtype

Backward, the same way round. A scale that varies along the dimension that is summed over cannot be pulled out of the
sum, so it multiplies the gradient first:

    dx = (g @ q_w) * s_w            s_w per channel:  dx = (g * s_w) @ q_w
    dW = (g^T @ q_x) * s_x          s_x per token:    dW = (g * s_x)^T @ q_x

With `grad_output` quantized, g is q_g * s_g (per tensor) and s_g multiplies last as well.
`qatrun.quant.linear` leaves out: fused epilogues. The matrix product is rounded to the compute dtype before its
scale is applied in float32 and the result is rounded again, one rounding more than a fused kernel makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatrun.formats import Role
from qatrun.numerics import amax as amax_of
from qatrun.numerics import clip_limit, inverse_scale, quantize_to_grid, saturates, scale_from_amax
from qatrun.quant.plan import QuantPlan
from qatrun.quant.state import Mode, ScaleState
from qatrun.recipe import ResolvedRole


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
        scale = scale_from_amax(amax_of(x, self.spec.granularity), self.spec.target_amax)
        return scale, inverse_scale(scale)

    def takes_own_scale(self, state: ScaleState) -> bool:
        """Whether a scale comes from the tensor at hand: per channel and per token always, dynamic while training (a
        weight's also when frozen: it does not depend on the batch), and any scaled slot that has no history yet."""
        if self.spec.granularity != "per_tensor":
            return True
        if self.spec.scaling.type == "dynamic" and (state.training or self.spec.role == "weight"):
            return True
        return self.spec.scaling.type != "none" and not state.primed

    def to_grid(self, x: Tensor, inv_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Grid values q of x / scale, in `dtype`."""
        return quantize_to_grid(x, inv_scale, self.spec.format, self.limit).to(dtype)

    def blocked(self, x: Tensor, inv_scale: Tensor) -> Tensor | None:
        """Bool mask of what the STE holds back: where x saturates. None: nothing."""
        return saturates(x.float() * inv_scale, self.spec.format, self.limit) if self.clipped_ste else None


class _FakeQuantMatmul(torch.autograd.Function):
    """y = scaled matmul of grid values; see the module's docstring for both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: FakeQuantLinear) -> Tensor:
        dtype, of_x, of_w = _compute_dtype(x), module.quantizers["input"], module.quantizers["weight"]
        s_x, inv_x = module.scales("input", x)
        s_w, inv_w = module.scales("weight", weight)
        q_x, q_w = of_x.to_grid(x, inv_x, dtype), of_w.to_grid(weight, inv_w, dtype)
        blocked_x, blocked_w = of_x.blocked(x, inv_x), of_w.blocked(weight, inv_w)
        ctx.save_for_backward(q_x, q_w, s_x, s_w, blocked_x, blocked_w)
        ctx.module, ctx.dtypes = module, (x.dtype, weight.dtype, bias.dtype if bias is not None else None)
        return scaled_matmul(q_x, q_w, s_x, s_w, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        (grad_output,) = grads
        q_x, q_w, s_x, s_w, blocked_x, blocked_w = ctx.saved_tensors
        x_dtype, w_dtype, b_dtype = ctx.dtypes
        module: FakeQuantLinear = ctx.module
        g, s_g = grad_output, None
        grad_bias = _rows(grad_output).float().sum(0).to(b_dtype) if b_dtype is not None else None
        if "grad_output" in module.quantizers:
            s_g, inv_g = module.scales("grad_output", grad_output)
            g = module.quantizers["grad_output"].to_grid(grad_output, inv_g, q_x.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _masked(_matmul_then_scale(g, q_w, s_w.flatten(), s_g), blocked_x).to(x_dtype)
        grad_w = _masked(_matmul_then_scale(_rows(g).t(), _rows(q_x), s_x.flatten(), s_g), blocked_w).to(w_dtype)
        return grad_x, grad_w, grad_bias, None


def scaled_matmul(q_x: Tensor, q_w: Tensor, s_x: Tensor, s_w: Tensor, bias: Tensor | None) -> Tensor:
    """y = (q_x @ q_w^T) * (s_x * s_w) + b

    Args:
        q_x, q_w: [..., in] and [out, in] grid values of one dtype, the compute dtype.
        s_x: float32, [] per tensor or [..., 1] per token.
        s_w: float32, [] per tensor or [out, 1] per channel.
        bias: [out] or None.
    Returns:
        [..., out] in the compute dtype.
    """
    scale = s_x * (s_w.flatten() if s_w.dim() else s_w)
    with torch.autocast(q_x.device.type, enabled=False):
        y = F.linear(q_x, q_w).float() * scale
    return (y if bias is None else y + bias.float()).to(q_x.dtype)


def _matmul_then_scale(a: Tensor, b: Tensor, summed_scale: Tensor, extra: Tensor | None) -> Tensor:
    """(a @ b) * scale in float32, with a scale that varies along the summed dimension multiplied into `a` first."""
    if summed_scale.numel() > 1:
        a, summed_scale = (a.float() * summed_scale).to(b.dtype), summed_scale.new_ones(())
    scale = summed_scale.reshape(()) if extra is None else summed_scale.reshape(()) * extra
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a, b).float() * scale


def _rows(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d]; a single vector is one row."""
    return x.reshape(-1, x.shape[-1])


def _masked(grad: Tensor, blocked: Tensor | None) -> Tensor:
    return grad if blocked is None else torch.where(blocked, 0.0, grad)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the matrix product runs in: autocast's dtype, else the input's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _ObserveGradient(torch.autograd.Function):
    """Identity whose backward records the amax of the output gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, module: FakeQuantLinear) -> Tensor:
        ctx.module = module
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_output,) = grads
        ctx.module.observe("grad_output", grad_output)
        return grad_output, None


class FakeQuantLinear(nn.Module):
    """A linear that shares another's parameters and trains through quantizers.

    Its `state_dict` has the same keys as the linear it stands for.

    Attributes:
        original: the linear it stands for, kept out of the module tree.
        state: the model's one ScaleState, registered on the model itself.
        slots: role -> index in that state.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    original: nn.Module
    state: ScaleState

    def __init__(self, original: nn.Module, name: str, plan: QuantPlan, state: ScaleState) -> None:
        super().__init__()
        self.weight = original.get_parameter("weight")
        self.register_parameter("bias", getattr(original, "bias", None))
        self.transposed = not isinstance(original, nn.Linear)  # Conv1D holds [in, out]
        # Not through nn.Module's registration, which would make them children and give state_dict new keys.
        self.__dict__.update(original=original, state=state)
        self.quantizers = {role: Quantizer.of_role(role, plan) for role in plan.roles}
        self.slots = {role: state.index[plan.slot_name(name, role)] for role in plan.roles}

    def effective_weight(self) -> Tensor:
        """[out, in], whatever way round the parameter is stored."""
        return self.weight.t() if self.transposed else self.weight

    def observe(self, role: Role, x: Tensor) -> None:
        """Record the amax of a role's tensor."""
        self.state.observe(self.slots[role], amax_of(x, "per_tensor"))

    def scales(self, role: Role, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, inv_scale), float32, [] or broadcastable to x [..., d]; records x's amax while training."""
        quantizer, slot = self.quantizers[role], self.slots[role]
        if self.state.training:
            self.observe(role, x)
        if quantizer.takes_own_scale(self.state):
            return quantizer.own_scales(x)
        return self.state.scale[slot], self.state.inv_scale[slot]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if self.state.mode is Mode.QUANTIZE:
            quantized: Tensor = _FakeQuantMatmul.apply(x, self.effective_weight(), self.bias, self)
            return quantized
        y: Tensor = self.original(x)
        if self.state.mode is Mode.OBSERVE and self.training:
            self.observe("input", x)
            self.observe("weight", self.weight)
            if "grad_output" in self.quantizers and torch.is_grad_enabled():
                y = _ObserveGradient.apply(y, self)
        return y
