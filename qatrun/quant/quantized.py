"""The frozen linear: what the artifact holds and what is scored."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qatrun.quant import operators
from qatrun.quant.linear import FakeQuantLinear
from qatrun.quant.matmul import scaled_matmul
from qatrun.quant.quantizer import OnGrid, Quantizer
from qatrun.quant.slot import Latest
from qatrun.quant.state import DeviceOnlyModule


class QuantizedLinear(DeviceOnlyModule):
    """y = (q_x @ q_w^T) * (s_x * s_w) + b with weights on their grid and input scales fixed.

    Attributes:
        q_weight: [out, in] grid values in the compute dtype, where they are exact.
        weight_scale: float32, [] per tensor or [out, 1] per channel.
        input_scale, input_inv_scale: [] float32; unused when inputs are quantized per token.
        bias: [out] in the compute dtype, or None.
        shared_input: the input as last quantized, one for all linears that read the same.
        number: by which operators know it.
    """

    q_weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    input_inv_scale: Tensor
    bias: Tensor | None
    input: Quantizer

    def __init__(
        self,
        tensors: dict[str, Tensor],
        *,
        input_quantizer: Quantizer,
        weight_format: str,
        shared_input: Latest,
    ) -> None:
        super().__init__()
        for name in ("q_weight", "weight_scale", "input_scale", "input_inv_scale", "bias"):
            self.register_buffer(name, tensors.get(name))
        self.input = input_quantizer
        self.weight_format = weight_format
        self.shared_input = shared_input
        self.number = operators.number(self)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        super().__setstate__(attributes)
        self.number = operators.number(self)  # a copy is another linear

    @classmethod
    @torch.no_grad()
    def from_trained(cls, linear: FakeQuantLinear, dtype: torch.dtype) -> QuantizedLinear:
        """Round the master weights to their grid with the scale that training would use next."""
        input, weight_spec = linear.quantizers["input"], linear.quantizers["weight"].rounding.spec
        weight = linear.weight_on_grid(linear.effective_weight(), dtype)
        tensors = {
            "q_weight": weight.in_dtype(dtype),
            "weight_scale": weight.scale.clone(),
            "input_scale": linear.state.scale[input.slot].clone(),
            "input_inv_scale": linear.state.inv_scale[input.slot].clone(),
        }
        if linear.bias is not None:
            tensors["bias"] = linear.bias.detach().to(dtype)
        return cls(
            tensors,
            input_quantizer=input.rounding,
            weight_format=weight_spec.format,
            shared_input=input.latest,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of x."""
        if torch.compiler.is_compiling():
            on_x = operators.on_grid(x, self.input, self.number, x.dtype, codes=False, takes_gradient=False)
            values, x = on_x.in_dtype(x.dtype), x.detach()
            y: Tensor = operators.linear(x, self.q_weight, self.bias, values, values, on_x.scale, None, self.number)[0]
            return y
        on_x = self.shared_input.get(x, partial(self.on_grid, x, x.dtype))
        return scaled_matmul(
            on_x.in_dtype(x.dtype), self.q_weight.to(x.dtype), on_x.scale, self.weight_scale, self.bias
        )

    def on_grid(self, x: Tensor, values: torch.dtype, *, codes: bool = False, takes_gradient: bool = False) -> OnGrid:
        """x [..., in] quantized, with the fixed scale or with scales per token."""
        scale, inv_scale = self.input_scale, self.input_inv_scale
        if self.input.spec.granularity != "per_tensor":
            scale, inv_scale = self.input.own_scales(x)
        return self.input.to_grid(x, scale, inv_scale, values, codes=codes, takes_gradient=takes_gradient)[0]

    def weight_on_grid(self, weight: Tensor, dtype: torch.dtype) -> OnGrid:
        """What `q_weight` stands for, in a compute dtype."""
        return OnGrid(self.weight_format, weight.to(dtype), None, self.weight_scale, None)

    def generation(self) -> int:
        """Changes with the scales: never."""
        return 0
