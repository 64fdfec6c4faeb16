"""The frozen linear: what the artifact holds and what is scored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qatrun.numerics import GRIDS, Fit, Grid, own_fit
from qatrun.quant import operators
from qatrun.quant.linear import Quantization
from qatrun.quant.matmul import scaled_matmul
from qatrun.quant.qtensor import QTensor, to_grid
from qatrun.quant.quantizer import Latest
from qatrun.scheme import Scheme


class Trained(Protocol):
    """A linear as it was trained, fake-quantized."""

    @property
    def quant(self) -> Quantization: ...

    @property
    def bias(self) -> Tensor | None: ...

    def effective_weight(self) -> Tensor: ...

    def weight_on_grid(self, weight: Tensor, dtype: torch.dtype) -> QTensor: ...


class QuantizedLinear(nn.Module):
    """y = (q_x @ q_w^T) * (s_x * s_w) + b with weights on their grid and input scales fixed.

    Attributes:
        q_weight: [out, in] grid values in the compute dtype, where they are exact.
        weight_scale: float32, [] per tensor or [out, 1] per channel.
        input_scale: [] float32; unused when inputs are quantized per token.
        input_zero_point: [] int8, None where inputs are symmetric; unused as well.
        bias: [out] in the compute dtype, or None.
        input_scheme: how inputs are quantized.
        shared_input: the input as last quantized, one for all linears that read the same.
        number: by which operators know it.
    """

    q_weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    input_inv_scale: Tensor
    input_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight: QTensor, bias: Tensor | None, input_scheme: Scheme, input_fit: Fit, shared_input: Latest
    ) -> None:
        super().__init__()
        assert weight.values is not None
        self.weight_grid, self.input_scheme, self.shared_input = weight.grid, input_scheme, shared_input
        self.register_buffer("q_weight", weight.values)
        self.register_buffer("weight_scale", weight.scale)
        scale, inv_scale, zero = input_fit
        self.register_buffer("input_scale", scale.clone())
        self.register_buffer("input_inv_scale", inv_scale.clone(), persistent=False)
        self.register_buffer("input_zero_point", None if zero is None else zero.to(torch.int8))
        self.register_buffer("bias", bias)
        self.number = operators.number(self)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        super().__setstate__(attributes)
        self.number = operators.number(self)  # a copy is another linear

    @classmethod
    @torch.no_grad()
    def from_trained(cls, linear: Trained, dtype: torch.dtype) -> QuantizedLinear:
        """Round the master weights to their grid with the scale that training would use next."""
        of_input = linear.quant.of["input"]
        weight = linear.weight_on_grid(linear.effective_weight(), dtype)
        return cls(
            QTensor(weight.grid, weight.values_in(dtype), None, weight.scale.clone()),
            None if linear.bias is None else linear.bias.detach().to(dtype),
            of_input.scheme,
            linear.quant.state.scales.fit(of_input.index),
            of_input.latest,
        )

    @property
    def weight(self) -> QTensor:
        """[out, in]"""
        return QTensor(self.weight_grid, self.q_weight, None, self.weight_scale)

    @property
    def input_grid(self) -> Grid:
        """That inputs are rounded to."""
        return GRIDS[self.input_scheme.format]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of x."""
        if torch.compiler.is_compiling():
            on_x = operators.on_grid(x, self.input_scheme, self.number, x.dtype, codes=False, takes_gradient=False)
            weight, x = self.q_weight, x.detach()
            y: Tensor = operators.linear(x, weight, self.bias, on_x.values, *on_x.kept, self.number)[0]
            return y
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out], with that bias."""
        on_x = self.shared_input.get(x, partial(self.on_grid, x, x.dtype))
        return scaled_matmul(on_x, self.weight, bias, x.dtype)

    def on_grid(self, x: Tensor, values: torch.dtype, *, codes: bool = False, takes_gradient: bool = False) -> QTensor:
        """x [..., in] quantized, with the fixed scale or with scales of its rows."""
        scheme, zero = self.input_scheme, self.input_zero_point
        if scheme.per_row:
            fit = own_fit(x, scheme)
        else:
            fit = self.input_scale, self.input_inv_scale, None if zero is None else zero.float()
        return to_grid(x, scheme, fit, values, codes=codes, takes_gradient=takes_gradient)[0]

    def weight_on_grid(self, weight: Tensor, dtype: torch.dtype) -> QTensor:
        """What `q_weight` stands for, in a compute dtype."""
        return QTensor(self.weight_grid, weight.to(dtype), None, self.weight_scale)

    def generation(self) -> int:
        """Changes with the scales: never."""
        return 0

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        # To another device, never to another dtype: scale arithmetic is float32 always, and grid values stay exact.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(torch.empty(0, device=buffer.device)).device)
        return self
