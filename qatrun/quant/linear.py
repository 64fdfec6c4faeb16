"""The fake-quantized linear: `matmul`'s arithmetic with a straight-through backward.

It is the very linear of the model under another class, as FSDP2 and torch's parametrizations do it: the parameters that it
computes with are those in the module tree, in every mode, whoever may swap them there; keys of `state_dict`, hooks and
references to the module stay as they are.

Each tensor is quantized no more often than it changes: a weight once an optimizer step, an input that several linears
read once for all of them. What the backward needs are the grid values that the forward made; with
`saved_activations: codes` they are kept as their 8-bit codes, which lose nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qatrun.formats import Role
from qatrun.numerics import Grid
from qatrun.quant import operators
from qatrun.quant.coded import CodedWeight
from qatrun.quant.matmul import Dtypes, Gradients, gradients, scaled_matmul
from qatrun.quant.qtensor import QTensor
from qatrun.quant.quantizer import Quantizer
from qatrun.quant.state import Mode, QuantState


class _FakeQuantMatmul(torch.autograd.Function):
    """y from x and the weight on their grids."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, linear: FakeQuantized, with_codes: bool
    ) -> Tensor:
        dtype = _compute_dtype(x)
        on_x = linear.quant.of["input"].on_grid_once(x, dtype, codes=with_codes)
        on_w = linear.weight_on_grid(weight, dtype)
        if linear.quant.state.keeps_grids:
            ctx.save_for_backward(*on_x.kept, *on_w.kept)
        else:  # the parameter, whose memory is given back until the backward gathers it again
            ctx.save_for_backward(*on_x.kept, weight)
        ctx.linear, ctx.grids, ctx.generation = linear, (on_x.grid, on_w.grid), linear.generation()
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype if bias is not None else None
        return scaled_matmul(on_x, on_w, bias, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, (x_grid, w_grid) = ctx.saved_tensors, ctx.grids
        on_x = QTensor.of_saved(x_grid, *saved[:4])
        if len(saved) == 5:
            if ctx.generation != ctx.linear.generation():
                raise RuntimeError(operators.MOVED)
            on_w = ctx.linear.weight_on_grid(saved[4], grads[0].dtype)
        else:
            on_w = QTensor.of_saved(w_grid, *saved[4:])
        x_dtype, w_dtype, b_dtype = (
            dtype if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)
        )
        return *ctx.linear.gradients(grads[0], on_x, on_w, (x_dtype, w_dtype, b_dtype)), None, None


class Quantization(NamedTuple):
    """What a linear is quantized with.

    Attributes:
        state: the model's one QuantState.
        of: role -> quantizer; linears that read the same input share that of "input".
    """

    state: QuantState
    of: Mapping[Role, Quantizer]
    saves_codes: bool


class FakeQuantized:
    """A weight and the inputs that it multiplies, fake-quantized.

    Attributes:
        quant: with what.
    """

    quant: Quantization

    def owner_of(self, weight: Tensor) -> Tensor | None:
        """The parameter that this weight is all or a part of; None for a stand-in of torch.func's in a compiled graph."""
        raise NotImplementedError

    @property
    def input_grid(self) -> Grid:
        """That inputs are rounded to."""
        return self.quant.of["input"].grid

    def generation(self) -> int:
        """Changes with the scales."""
        return self.quant.state.scales.num_changes

    def weight_on_grid(self, weight: Tensor, dtype: torch.dtype) -> QTensor:
        """The effective weight [out, in] quantized, once for every change of the parameter. It lives as long as the
        step, so where codes are saved it is codes alone."""
        if isinstance(weight, CodedWeight):
            return weight.quantized
        state, quantizer = self.quant.state, self.quant.of["weight"]
        if not state.keeps_grids:
            return quantizer.on_grid(weight, dtype, takes_gradient=True)
        values, codes = (None, True) if self.quant.saves_codes else (dtype, False)
        owner = self.owner_of(weight)
        if owner is None:
            return quantizer.on_grid(weight, values, codes=codes, takes_gradient=True)
        return quantizer.on_grid_once(weight, values, codes=codes, key=owner)

    def gradients(self, grad_output: Tensor, on_x: QTensor, on_w: QTensor, dtypes: Dtypes) -> Gradients:
        """Those of x, weight and bias (see `matmul.gradients`), the output gradient quantized first where it is to be."""
        quantizer = self.quant.of.get("grad_output")
        on_g = quantizer.on_grid(grad_output, grad_output.dtype) if quantizer else None
        if self.quant.state.last_micro_batch:
            self.quant.of["weight"].latest.forget()
        return gradients(grad_output, on_g, on_x, on_w, dtypes)

    def observe(self, x: Tensor, weight: Tensor) -> None:
        """Record the amaxes of an input and of the weight."""
        self.quant.of["input"].observe(x)
        self.quant.of["weight"].observe(weight)

    def observe_gradient(self, grad_output: Tensor) -> None:
        """Record the amax of an output gradient, if such are quantized."""
        if "grad_output" in self.quant.of:
            self.quant.of["grad_output"].observe(grad_output)


def fake_quantized(x: Tensor, weight: Tensor, bias: Tensor | None, by: FakeQuantized) -> Tensor:
    """y [..., out] from x [..., in] and the effective weight [out, in], both quantized; with a straight-through backward."""
    codes = by.quant.saves_codes and torch.is_grad_enabled()
    y: Tensor = _FakeQuantMatmul.apply(x, weight, bias, by, codes)
    return y


class FakeQuantLinear(FakeQuantized, nn.Module):
    """What is common to the classes that linears take on; each derives from this and from the linear's own class.

    Attributes:
        plain_class: the linear's own class.
        number: by which operators know it.
    """

    plain_class: type[nn.Module]
    weight: nn.Parameter
    bias: nn.Parameter | None
    number: Tensor

    @staticmethod
    def put_on(linear: nn.Module, quant: Quantization) -> None:
        """Make the linear one of these."""
        linear.__class__ = _fake_quantized(type(linear))
        linear.__dict__ |= {"quant": quant, "number": operators.number(linear)}

    def take_off(self) -> None:
        """Make it the linear that it was."""
        operators.forget(self.number)
        del self.quant, self.number
        self.__class__ = self.plain_class  # type: ignore[assignment]  # it is one of its subclasses

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_state, (self.plain_class,), self.__dict__  # the class has no name that pickle could find

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        super().__setstate__(attributes)
        self.number = operators.number(self)  # a copy is another linear

    @property
    def transposed(self) -> bool:
        """Whether the weight is [in, out], as Conv1D holds it."""
        return not isinstance(self, nn.Linear)

    def owner_of(self, weight: Tensor) -> Tensor | None:
        """Its own parameter."""
        return self.weight if weight.data_ptr() == self.weight.data_ptr() else None

    def effective_weight(self) -> Tensor:
        """[out, in], whatever way round the parameter is stored."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        mode = self.quant.state.mode
        if mode is Mode.QUANTIZE:
            return self._quantized(x)
        y: Tensor = super().forward(x)
        return self._observed(x, y) if mode is Mode.OBSERVE and self.training else y

    def _quantized(self, x: Tensor) -> Tensor:
        weight = self.effective_weight()
        if not torch.compiler.is_compiling():
            return fake_quantized(x, weight, self.bias, self)
        codes = self.quant.saves_codes and torch.is_grad_enabled()
        quantizer, dtype = self.quant.of["input"], _compute_dtype(x)
        on_x = operators.on_grid(
            x, quantizer.scheme, quantizer.number, dtype, codes=codes, takes_gradient=x.requires_grad
        )
        in_graph: Tensor = operators.linear(x, weight, self.bias, on_x.values, *on_x.kept, self.number)[0]
        return in_graph

    def _observed(self, x: Tensor, y: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            in_graph: Tensor = operators.observe(y, x.detach(), self.weight.detach(), self.number)
            return in_graph
        self.observe(x, self.weight)
        if "grad_output" in self.quant.of and y.requires_grad:
            # Seen as it is for y as it is now: a model may go on to change it in place.
            y.register_hook(self.observe_gradient)
        return y


_CLASSES: dict[type[nn.Module], type[FakeQuantLinear]] = {}


def _fake_quantized(plain: type[nn.Module]) -> type[FakeQuantLinear]:
    """The one class that linears of this class take on."""
    if plain not in _CLASSES:
        _CLASSES[plain] = type(f"FakeQuant{plain.__name__}", (FakeQuantLinear, plain), {"plain_class": plain})
    return _CLASSES[plain]


def _without_state(plain: type[nn.Module]) -> FakeQuantLinear:
    kind = _fake_quantized(plain)
    return kind.__new__(kind)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the matrix product runs in: autocast's dtype, else the input's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
