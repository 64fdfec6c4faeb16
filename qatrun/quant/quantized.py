"""The frozen linear: what the artifact holds and what is scored."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

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

    # What is remembered between linears is not for torch.compile's eyes: it compiles what lies between them. This is
    # torch.compiler.disable, less the second that the latter spends on importing the compiler at once.
    @_disable_dynamo
    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of x."""
        on_x = self.shared_input.get(x, partial(self._on_grid, x))
        return scaled_matmul(
            on_x.in_dtype(x.dtype), self.q_weight.to(x.dtype), on_x.scale, self.weight_scale, self.bias
        )

    def _on_grid(self, x: Tensor) -> OnGrid:
        scale, inv_scale = self.input_scale, self.input_inv_scale
        if self.input.spec.granularity != "per_tensor":
            scale, inv_scale = self.input.own_scales(x)
        return self.input.to_grid(x, scale, inv_scale, x.dtype)[0]
