"""The frozen linear: what the artifact holds and what is scored."""

from __future__ import annotations

import torch
from torch import Tensor

from qatrun.quant.linear import FakeQuantLinear, Quantizer, scaled_matmul
from qatrun.quant.state import DeviceOnlyModule


class QuantizedLinear(DeviceOnlyModule):
    """y = (q_x @ q_w^T) * (s_x * s_w) + b with weights on their grid and input scales fixed.

    Attributes:
        q_weight: [out, in] grid values in the compute dtype, where they are exact.
        weight_scale: float32, [] per tensor or [out, 1] per channel.
        input_scale, input_inv_scale: [] float32; unused when inputs are quantized per token.
        bias: [out] in the compute dtype, or None.
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
    ) -> None:
        super().__init__()
        for name in ("q_weight", "weight_scale", "input_scale", "input_inv_scale", "bias"):
            self.register_buffer(name, tensors.get(name))
        self.input = input_quantizer
        self.weight_format = weight_format

    @classmethod
    @torch.no_grad()
    def from_trained(cls, linear: FakeQuantLinear, dtype: torch.dtype) -> QuantizedLinear:
        """Round the master weights to their grid with the scale that training would use next."""
        weight, state = linear.effective_weight(), linear.state
        slot, quantizer = linear.slots["input"], linear.quantizers["weight"]
        scale, inv_scale = linear.scales("weight", weight)
        tensors = {
            "q_weight": quantizer.to_grid(weight, inv_scale, dtype).contiguous(),
            "weight_scale": scale.clone(),
            "input_scale": state.scale[slot].clone(),
            "input_inv_scale": state.inv_scale[slot].clone(),
        }
        if linear.bias is not None:
            tensors["bias"] = linear.bias.detach().to(dtype)
        return cls(tensors, input_quantizer=linear.quantizers["input"], weight_format=quantizer.spec.format)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of x."""
        s_x, inv_x = self.input_scale, self.input_inv_scale
        if self.input.spec.granularity != "per_tensor":
            s_x, inv_x = self.input.own_scales(x)
        q_x = self.input.to_grid(x, inv_x, x.dtype)
        return scaled_matmul(q_x, self.q_weight.to(x.dtype), s_x, self.weight_scale, self.bias)
