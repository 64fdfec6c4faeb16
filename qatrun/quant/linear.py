"""The fake-quantized linear: `matmul`'s arithmetic with a straight-through backward.

Each tensor is quantized no more often than it changes: a weight once an optimizer step, an input that several linears
read once for all of them. What the backward needs are the grid values that the forward made; with
`saved_activations: codes` they are kept as their 8-bit codes, which lose nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qatrun.formats import Role
from qatrun.quant import operators
from qatrun.quant.matmul import Dtypes, Gradients, gradients, scaled_matmul
from qatrun.quant.quantizer import OnGrid
from qatrun.quant.slot import SlotQuantizer
from qatrun.quant.state import Mode, ScaleState


class _FakeQuantMatmul(torch.autograd.Function):
    """y from x and the weight on their grids."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: FakeQuantLinear, with_codes: bool
    ) -> Tensor:
        dtype = _compute_dtype(x)
        on_x = module.quantizers["input"].on_grid_once(x, dtype, codes=with_codes)
        on_w = module.weight_on_grid(weight, dtype)
        ctx.save_for_backward(on_x.saved, on_x.scale, on_x.blocked, on_w.saved, on_w.scale, on_w.blocked)
        ctx.module, ctx.formats = module, (on_x.format, on_w.format)
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype if bias is not None else None
        return scaled_matmul(on_x.in_dtype(dtype), on_w.in_dtype(dtype), on_x.scale, on_w.scale, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, (x_format, w_format) = ctx.saved_tensors, ctx.formats
        on_x, on_w = OnGrid.of_saved(x_format, *saved[:3]), OnGrid.of_saved(w_format, *saved[3:])
        x_dtype, w_dtype, b_dtype = (
            dtype if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)
        )
        return *ctx.module.gradients(grads[0], on_x, on_w, (x_dtype, w_dtype, b_dtype)), None, None


class FakeQuantLinear(nn.Module):
    """A linear that shares another's parameters and trains through quantizers.

    Its `state_dict` has the same keys as the linear it stands for.

    Attributes:
        original: the linear it stands for, kept out of the module tree.
        state: the model's one ScaleState, registered on the model itself.
        quantizers: role -> quantizer; linears that read the same input share that of "input".
        number: by which operators know it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    original: nn.Module
    state: ScaleState

    def __init__(
        self, original: nn.Module, state: ScaleState, quantizers: Mapping[Role, SlotQuantizer], *, saves_codes: bool
    ) -> None:
        super().__init__()
        self.weight = original.get_parameter("weight")
        self.register_parameter("bias", getattr(original, "bias", None))
        self.transposed = not isinstance(original, nn.Linear)  # Conv1D holds [in, out]
        # Not through nn.Module's registration, which would make them children and give state_dict new keys.
        self.__dict__.update(original=original, state=state)
        self.quantizers = dict(quantizers)
        self.saves_codes = saves_codes
        self.number = operators.number(self)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        super().__setstate__(attributes)
        self.number = operators.number(self)  # a copy is another linear

    @property
    def input_format(self) -> str:
        """Name of the format that inputs are rounded to."""
        return self.quantizers["input"].rounding.spec.format

    def generation(self) -> int:
        """Changes with the scales."""
        return self.state.num_changes

    def effective_weight(self) -> Tensor:
        """[out, in], whatever way round the parameter is stored."""
        return self.weight.t() if self.transposed else self.weight

    def weight_on_grid(self, weight: Tensor, dtype: torch.dtype) -> OnGrid:
        """The effective weight [out, in] quantized, once for every change of the parameter. It lives as long as the
        step, so where codes are saved it is codes alone."""
        values, codes = (None, True) if self.saves_codes else (dtype, False)
        quantizer = self.quantizers["weight"]
        if weight.data_ptr() != self.weight.data_ptr():  # a stand-in of torch.func's in a compiled graph
            return quantizer.on_grid(weight, values, codes=codes, takes_gradient=True)
        return quantizer.on_grid_once(weight, values, codes=codes, key=self.weight)

    def gradients(self, grad_output: Tensor, on_x: OnGrid, on_w: OnGrid, dtypes: Dtypes) -> Gradients:
        """Those of x, weight and bias (see `matmul.gradients`), the output gradient quantized first where it is to be."""
        quantizer = self.quantizers.get("grad_output")
        on_g = quantizer.on_grid(grad_output, grad_output.dtype) if quantizer else None
        if self.state.last_micro_batch:
            self.quantizers["weight"].latest.forget()
        return gradients(grad_output, on_g, on_x, on_w, dtypes)

    def observe(self, x: Tensor, weight: Tensor) -> None:
        """Record the amaxes of an input and of the weight."""
        self.quantizers["input"].observe(x)
        self.quantizers["weight"].observe(weight)

    def observe_gradient(self, grad_output: Tensor) -> None:
        """Record the amax of an output gradient, if such are quantized."""
        if "grad_output" in self.quantizers:
            self.quantizers["grad_output"].observe(grad_output)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if self.state.mode is Mode.QUANTIZE:
            return self._quantized(x)
        y: Tensor = self.original(x)
        return self._observed(x, y) if self.state.mode is Mode.OBSERVE and self.training else y

    def _quantized(self, x: Tensor) -> Tensor:
        weight, codes = self.effective_weight(), self.saves_codes and torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            y: Tensor = _FakeQuantMatmul.apply(x, weight, self.bias, self, codes)
            return y
        input, dtype = self.quantizers["input"], _compute_dtype(x)
        on_x = operators.on_grid(x, input.rounding, input.number, dtype, codes=codes, takes_gradient=x.requires_grad)
        in_graph: Tensor = operators.linear(
            x, weight, self.bias, on_x.values, on_x.saved, on_x.scale, on_x.blocked, self.number
        )[0]
        return in_graph

    def _observed(self, x: Tensor, y: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            in_graph: Tensor = operators.observe(y, x.detach(), self.weight.detach(), self.number)
            return in_graph
        self.observe(x, self.weight)
        if "grad_output" in self.quantizers and y.requires_grad:
            # Seen as it is for y as it is now: a model may go on to change it in place.
            y.register_hook(self.observe_gradient)
        return y


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the matrix product runs in: autocast's dtype, else the input's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
