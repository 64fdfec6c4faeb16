"""The fake-quantized linear: W8A8 arithmetic as a kernel does it, with a straight-through backward.

Forward, on grid values (exact in bfloat16 for all four formats), scales multiplied after:

    y = (q_x @ q_w^T) * (s_x * s_w) + b             accumulated in float32, rounded to the compute dtype

Backward, the same way round. A scale that varies along the dimension that is summed over cannot be pulled out of the
sum, so it multiplies the gradient first:

    dx = (g @ q_w) * s_w            s_w per channel:  dx = (g * s_w) @ q_w
    dW = (g^T @ q_x) * s_x          s_x per token:    dW = (g * s_x)^T @ q_x

With `grad_output` quantized, g is q_g * s_g (per tensor) and s_g multiplies last as well.
Each tensor is quantized no more often than it changes: a weight once an optimizer step, an input that several linears
read once for all of them. What the backward needs are the grid values that the forward made; with
`saved_activations: codes` they are kept as their 8-bit codes, which lose nothing.

What this leaves out: fused epilogues. The matrix product is rounded to the compute dtype before its scale is applied in
float32 and the result is rounded again, one rounding more than a fused kernel makes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from qatrun.formats import Role
from qatrun.numerics import amax, rescale_, scale_gradient
from qatrun.quant.plan import QuantPlan
from qatrun.quant.quantizer import Latest, OnGrid, Quantizer, grid_values
from qatrun.quant.state import Mode, ScaleState


class _FakeQuantMatmul(torch.autograd.Function):
    """y = scaled matmul of grid values; see the module's docstring for both directions."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: FakeQuantLinear, with_codes: bool
    ) -> Tensor:
        dtype = _compute_dtype(x)
        on_x, on_w = module.input_on_grid(x, dtype, codes=with_codes), module.weight_on_grid(weight, dtype)
        ctx.save_for_backward(on_x.saved, on_w.saved, on_x.scale, on_w.scale, on_x.blocked, on_w.blocked)
        ctx.module, ctx.compute_dtype = module, dtype
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype if bias is not None else None
        return scaled_matmul(on_x.in_dtype(dtype), on_w.in_dtype(dtype), on_x.scale, on_w.scale, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad_output,) = grads
        saved_x, saved_w, s_x, s_w, blocked_x, blocked_w = ctx.saved_tensors
        module, dtype, (x_dtype, w_dtype, b_dtype) = ctx.module, ctx.compute_dtype, ctx.dtypes
        g, s_g = grad_output, None
        if "grad_output" in module.quantizers:
            on_g = module.on_grid("grad_output", grad_output, dtype)
            g, s_g = on_g.in_dtype(dtype), on_g.scale
        grad_x = grad_w = grad_bias = None
        if ctx.needs_input_grad[0]:
            q_w = grid_values(saved_w, module.quantizers["weight"].spec.format, dtype)
            grad_x = _scaled_product(g, q_w, s_w.flatten(), s_g, blocked_x, x_dtype)
        if ctx.needs_input_grad[1]:
            q_x = grid_values(saved_x, module.quantizers["input"].spec.format, dtype)
            grad_w = _scaled_product(_rows(g).t(), _rows(q_x), s_x.flatten(), s_g, blocked_w, w_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = _rows(grad_output).sum(0, dtype=torch.float32).to(b_dtype)
        return grad_x, grad_w, grad_bias, None, None


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
    with torch.autocast(q_x.device.type, enabled=False):
        return rescale_(F.linear(q_x, q_w), s_x, s_w.flatten() if s_w.dim() else s_w, bias)


def _scaled_product(
    a: Tensor, b: Tensor, summed_scale: Tensor, extra: Tensor | None, blocked: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(a @ b) * scale in float32, zero where blocked. A scale that varies along the summed dimension multiplies `a`."""
    if summed_scale.numel() > 1:
        a, summed_scale = (a.float() * summed_scale).to(b.dtype), summed_scale.new_ones(())
    scale = summed_scale.reshape(()) if extra is None else summed_scale.reshape(()) * extra
    with torch.autocast(a.device.type, enabled=False):
        return scale_gradient(torch.matmul(a, b), scale, blocked, dtype)


def _rows(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d]; a single vector is one row."""
    return x.reshape(-1, x.shape[-1])


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
        shared_input: the input as last quantized, one for all linears that read the same.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    original: nn.Module
    state: ScaleState

    def __init__(
        self, original: nn.Module, name: str, plan: QuantPlan, state: ScaleState, shared_input: Latest
    ) -> None:
        super().__init__()
        self.weight = original.get_parameter("weight")
        self.register_parameter("bias", getattr(original, "bias", None))
        self.transposed = not isinstance(original, nn.Linear)  # Conv1D holds [in, out]
        # Not through nn.Module's registration, which would make them children and give state_dict new keys.
        self.__dict__.update(original=original, state=state)
        self.quantizers = {role: Quantizer.of_role(role, plan) for role in plan.roles}
        self.slots = {role: state.index[plan.slot_name(name, role)] for role in plan.roles}
        self.saves_codes = plan.saved_activations == "codes"
        self.shared_input, self._own_weight = shared_input, Latest()

    def observe(self, role: Role, x: Tensor) -> None:
        """Record the amax of a role's tensor."""
        self.state.observe(self.slots[role], amax(x, "per_tensor"))

    def on_grid(self, role: Role, x: Tensor, values: torch.dtype | None, *, codes: bool = False) -> OnGrid:
        """A tensor of a role [..., d], quantized to values, codes or both; records what it saw while training."""
        quantizer, slot = self.quantizers[role], self.slots[role]
        if quantizer.takes_own_scale(self.state):
            scale, inv_scale = quantizer.own_scales(x)
        else:
            scale, inv_scale = self.state.scale[slot], self.state.inv_scale[slot]
        result, seen = quantizer.to_grid(x, scale, inv_scale, values, codes=codes)
        if self.state.training:
            self.state.observe(slot, seen.amax)
            self.state.count(slot, seen.counts, x.numel())
            if self.state.measures_noise:
                self.state.measure_noise(slot, x, result.in_dtype(torch.float32).float() * scale)
        return result

    def input_on_grid(self, x: Tensor, dtype: torch.dtype, *, codes: bool) -> OnGrid:
        """x [..., in] quantized, once for all linears that read it."""
        make = partial(self.on_grid, "input", x, dtype, codes=codes)
        return self.shared_input.get(x, make, dtype, codes, self.state.generation())

    def weight_on_grid(self, weight: Tensor, dtype: torch.dtype) -> OnGrid:
        """The effective weight [out, in] quantized, once for every change of the parameter. It lives as long as the
        step, so where codes are saved it is codes alone."""
        make = partial(self.on_grid, "weight", weight, None if self.saves_codes else dtype, codes=self.saves_codes)
        return self._own_weight.get(self.weight, make, dtype, self.state.generation())

    def effective_weight(self) -> Tensor:
        """[out, in], whatever way round the parameter is stored."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if self.state.mode is Mode.QUANTIZE:
            quantized: Tensor = self._quantized(x, with_codes=self.saves_codes and torch.is_grad_enabled())
            return quantized
        y: Tensor = self.original(x)
        if self.state.mode is Mode.OBSERVE and self.training:
            self.observe("input", x)
            self.observe("weight", self.weight)
            if "grad_output" in self.quantizers and torch.is_grad_enabled():
                y = _ObserveGradient.apply(y, self)
        return y

    # Scales, caches and C++ are not for torch.compile's eyes: it compiles what lies between the linears. This is
    # torch.compiler.disable, less the second that the latter spends on importing the compiler at once.
    @_disable_dynamo
    def _quantized(self, x: Tensor, *, with_codes: bool) -> Tensor:
        y: Tensor = _FakeQuantMatmul.apply(x, self.effective_weight(), self.bias, self, with_codes)
        return y
