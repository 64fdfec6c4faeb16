"""Quantized linears as operators, which is how torch.compile sees them: a model stays one graph.

    qatrun::to_grid            x -> its grid values, their codes, its scale, where the STE holds the gradient back
    qatrun::linear             those and a weight -> y
    qatrun::linear_gradients   the backward of that
    qatrun::observe            y, once the amaxes of x and of the weight are recorded; its backward is
    qatrun::observe_gradient   a gradient, once its amax is recorded

A graph holds tensors and numbers, no modules, so an operator is told by number whose scales and weight it works with. It
runs what runs without torch.compile: the same kernels, a weight quantized once an optimizer step, amax and counts recorded.
To the compiler these look like functions of their arguments alone, so it may merge the `to_grid` of linears that read one
input. What they record grows by a maximum or is read as a fraction: to merge or recompute one changes nothing. A replayed
CUDA graph would record nothing; a tag keeps them out of it.

No result shares memory with a scale or with an argument: a compiled graph reuses the memory of what it no longer needs.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import custom_op

from qatrun.numerics import code_dtype
from qatrun.quant.matmul import scaled_matmul
from qatrun.quant.quantizer import OnGrid

_TAGS = (torch.Tag.cudagraph_unsafe,)
_numbers = count()
_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()  # of a SlotQuantizer or FakeQuantLinear each


def number(owner: object) -> int:
    """A number by which operators find the owner of scales or of a weight for as long as it lives."""
    given = next(_numbers)
    _owners[given] = owner
    return given


@custom_op("qatrun::to_grid", mutates_args=(), tags=_TAGS)
def to_grid(
    x: Tensor, quantizer: int, values: torch.dtype, codes: bool, takes_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, codes, scale, blocked) of `SlotQuantizer.on_grid`, empty where it gives none."""
    on_grid = _owners[quantizer].on_grid(x, values, codes=codes, takes_gradient=takes_gradient)
    none = x.new_empty(0, dtype=torch.uint8)
    return (
        on_grid.values,
        none if on_grid.codes is None else on_grid.codes,
        on_grid.scale.clone(),
        none.clone() if on_grid.blocked is None else on_grid.blocked,
    )


@to_grid.register_fake
def _(
    x: Tensor, quantizer: int, values: torch.dtype, codes: bool, takes_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rounding = _owners[quantizer].rounding
    per_row = rounding.spec.granularity != "per_tensor"
    num_blocked = -(-x.numel() // 8) if rounding.clipped_ste and takes_gradient else 0
    return (
        x.new_empty(x.shape, dtype=values),
        x.new_empty(x.shape if codes else 0, dtype=code_dtype(rounding.spec.format) if codes else torch.uint8),
        x.new_empty((*x.shape[:-1], 1) if per_row else (), dtype=torch.float32),
        x.new_empty(num_blocked, dtype=torch.uint8),
    )


@custom_op("qatrun::linear", mutates_args=(), tags=_TAGS)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    saved: Tensor,
    scale: Tensor,
    blocked: Tensor,
    owner: int,
) -> Tensor:
    """y of the FakeQuantLinear of that number.

    Args:
        x, weight, bias: what gradients are for; the weight [out, in] as it is to be quantized.
        values, scale, blocked: x as `to_grid` gives it.
        saved: the values or their codes, whichever the backward is to keep.
    """
    on_w = _owners[owner].weight_on_grid(weight, values.dtype)
    return scaled_matmul(values, on_w.in_dtype(values.dtype), scale, on_w.scale, bias)


@linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    saved: Tensor,
    scale: Tensor,
    blocked: Tensor,
    owner: int,
) -> Tensor:
    return values.new_empty((*values.shape[:-1], weight.shape[0]))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, saved, scale, blocked, ctx.owner = inputs
    ctx.save_for_backward(weight, saved, scale, blocked)
    ctx.dtypes = x.dtype, weight.dtype, bias.dtype if bias is not None else None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    dtypes = (dtype if needs else None for dtype, needs in zip(ctx.dtypes, needed, strict=True))
    gradients = linear_gradients(grad, *ctx.saved_tensors, ctx.owner, *dtypes)
    given = (gradient if needs else None for gradient, needs in zip(gradients, needed, strict=True))
    return *given, None, None, None, None, None


linear.register_autograd(_linear_backward, setup_context=_keep_for_backward)


@custom_op("qatrun::linear_gradients", mutates_args=(), tags=_TAGS)
def linear_gradients(
    grad: Tensor,
    weight: Tensor,
    saved: Tensor,
    scale: Tensor,
    blocked: Tensor,
    owner: int,
    to_x: torch.dtype | None,
    to_weight: torch.dtype | None,
    to_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`FakeQuantLinear.gradients` of x, weight and bias in these dtypes, empty where the dtype is None."""
    module = _owners[owner]
    on_x = OnGrid.of_saved(module.input_format, saved, scale, blocked if blocked.numel() else None)
    gradients = module.gradients(grad, on_x, module.weight_on_grid(weight, grad.dtype), (to_x, to_weight, to_bias))
    of_x, of_weight, of_bias = (grad.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return of_x, of_weight, of_bias


@linear_gradients.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    saved: Tensor,
    scale: Tensor,
    blocked: Tensor,
    owner: int,
    to_x: torch.dtype | None,
    to_weight: torch.dtype | None,
    to_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(saved.shape if to_x else 0, dtype=to_x),
        grad.new_empty(weight.shape if to_weight else 0, dtype=to_weight),
        grad.new_empty(weight.shape[0] if to_bias else 0, dtype=to_bias),
    )


@custom_op("qatrun::observe", mutates_args=(), tags=_TAGS)
def observe(y: Tensor, x: Tensor, weight: Tensor, owner: int) -> Tensor:
    """y, the amaxes of x and weight recorded by the FakeQuantLinear of that number."""
    _owners[owner].observe(x, weight)
    return y.clone(memory_format=torch.contiguous_format)


@observe.register_fake
def _(y: Tensor, x: Tensor, weight: Tensor, owner: int) -> Tensor:
    return y.new_empty(y.shape)


@custom_op("qatrun::observe_gradient", mutates_args=(), tags=_TAGS)
def observe_gradient(grad: Tensor, owner: int) -> Tensor:
    """grad, its amax recorded where gradients are quantized."""
    _owners[owner].observe_gradient(grad)
    return grad.clone(memory_format=torch.contiguous_format)


@observe_gradient.register_fake
def _(grad: Tensor, owner: int) -> Tensor:
    return grad.new_empty(grad.shape)


def _keep_owner(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.owner = inputs[-1]


def _observe_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return observe_gradient(grad, ctx.owner), None, None, None


observe.register_autograd(_observe_backward, setup_context=_keep_owner)
