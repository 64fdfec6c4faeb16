"""Quantized linears as operators, which is how torch.compile sees them: a model stays one graph.

    qatrun::to_grid            x -> its grid values, their codes, its scale, where the STE holds the gradient back
    qatrun::linear             those and a weight -> y
    qatrun::linear_gradients   the backward of that
    qatrun::observe            y, once the amaxes of x and of the weight are recorded; its backward is
    qatrun::observe_gradient   a gradient, once its amax is recorded

A graph holds tensors, no modules, so an operator is told by number whose scales and weight it works with. It runs what runs
without torch.compile: the same kernels, a weight quantized once an optimizer step, amax and counts recorded. The numbers are
tensors, so that layers and copies of a model share one graph and what compilers keep on disk tells no two models apart.

To the compiler these look like functions of their arguments alone, so it may merge the `to_grid` of linears that read one
input. What they record grows by a maximum or is read as a fraction: to merge or recompute one changes nothing. A replayed
CUDA graph would record nothing; a tag keeps them out of it. No result shares memory with a scale or with an argument: a
compiled graph reuses the memory of what it no longer needs.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import custom_op

from qatrun.numerics import GRIDS
from qatrun.quant.matmul import scaled_matmul
from qatrun.quant.qtensor import QTensor, holds_back
from qatrun.scheme import GRANULARITIES, Scheme

MOVED = "scales moved between forward and backward: call push after the backward"
_TAGS = (torch.Tag.cudagraph_unsafe,)
_numbers = count()
_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number(owner: object) -> Tensor:
    """A number, [] int64 on the CPU, by which operators find this owner of scales or of a weight while it lives."""
    given = next(_numbers)
    _owners[given] = owner
    return torch.tensor(given)


def forget(number: Tensor) -> None:
    """Let no graph find the owner of that number any more."""
    _owners.pop(int(number), None)


def _find(number: Tensor) -> Any:
    try:
        return _owners[int(number)]
    except KeyError:
        raise RuntimeError("a compiled graph ran whose quantizers are gone: detached, frozen or deleted") from None


def on_grid(
    x: Tensor, scheme: Scheme, owner: Tensor, values: torch.dtype, *, codes: bool, takes_gradient: bool
) -> QTensor:
    """x [..., d] quantized by the owner of that number, whose scheme this is; see `qtensor.to_grid`."""
    grid, masked = GRIDS[scheme.format], holds_back(scheme, takes_gradient)
    x_values, x_codes, scale, blocked, zero = to_grid(
        x.detach(), owner, values, grid.code_dtype if codes else None, scheme.granularity, masked
    )
    kept = blocked if masked else None, None if scheme.symmetric else zero
    return QTensor(grid, x_values, x_codes if codes else None, scale, *kept)


@custom_op("qatrun::to_grid", mutates_args=(), tags=_TAGS)
def to_grid(
    x: Tensor, owner: Tensor, values: torch.dtype, codes: torch.dtype | None, granularity: str, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(values, codes, scale, blocked, zero) of x, empty where not asked for; without a zero-point 0.

    Args:
        granularity: what shares a scale, by its name.
    """
    result = _find(owner).on_grid(x, values, codes=codes is not None, takes_gradient=masked)
    return (
        result.values,
        x.new_empty(0) if codes is None else result.codes,
        result.scale.clone(),
        x.new_empty(0) if not masked else result.blocked,
        torch.zeros_like(result.scale) if result.zero is None else result.zero.clone(),
    )


@to_grid.register_fake
def _(
    x: Tensor, owner: Tensor, values: torch.dtype, codes: torch.dtype | None, granularity: str, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scale = x.new_empty(GRANULARITIES[granularity].scale_shape(x.shape), dtype=torch.float32)
    return (
        x.new_empty(x.shape, dtype=values),
        x.new_empty(0) if codes is None else x.new_empty(x.shape, dtype=codes),
        scale,
        x.new_empty(-(-x.numel() // 8), dtype=torch.uint8) if masked else x.new_empty(0),
        torch.empty_like(scale),
    )


@custom_op("qatrun::linear", mutates_args=(), tags=_TAGS)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    saved: Tensor,
    scale: Tensor,
    blocked: Tensor | None,
    zero: Tensor | None,
    owner: Tensor,
) -> tuple[Tensor, Tensor]:
    """y of the owner of that number, and the generation of its scales, [] int64.

    Args:
        x, weight, bias: what gradients are for; the weight [out, in] as it is to be quantized.
        values, scale, blocked, zero: x on its grid.
        saved: the values or their codes, whichever the backward is to keep.
    """
    module = _find(owner)
    on_x, on_w = QTensor(module.input_grid, values, None, scale), module.weight_on_grid(weight, values.dtype)
    return scaled_matmul(on_x, on_w, bias, values.dtype), torch.tensor(module.generation())


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty((*values.shape[:-1], weight.shape[0])), torch.empty_like(others[-1])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, *kept_and_owner = inputs
    ctx.save_for_backward(weight, *kept_and_owner, output[1])
    ctx.dtypes = x.dtype, weight.dtype, bias.dtype if bias is not None else None


def _linear_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    dtypes = (dtype if needs else None for dtype, needs in zip(ctx.dtypes, needed, strict=True))
    gradients = linear_gradients(grad, *ctx.saved_tensors, *dtypes)
    given = (gradient if needs else None for gradient, needs in zip(gradients, needed, strict=True))
    return *given, None, None, None, None, None, None


linear.register_autograd(_linear_backward, setup_context=_keep_for_backward)


@custom_op("qatrun::linear_gradients", mutates_args=(), tags=_TAGS)
def linear_gradients(
    grad: Tensor,
    weight: Tensor,
    saved: Tensor,
    scale: Tensor,
    blocked: Tensor | None,
    zero: Tensor | None,
    owner: Tensor,
    generation: Tensor,
    to_x: torch.dtype | None,
    to_weight: torch.dtype | None,
    to_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`FakeQuantLinear.gradients` of x, weight and bias in these dtypes, empty where the dtype is None.

    Raises:
        RuntimeError: the scales are of another generation than in the forward.
    """
    module = _find(owner)
    if int(generation) != module.generation():
        raise RuntimeError(MOVED)
    on_x = QTensor.of_saved(module.input_grid, saved, scale, blocked, zero)
    found = module.gradients(grad, on_x, module.weight_on_grid(weight, grad.dtype), (to_x, to_weight, to_bias))
    of_x, of_weight, of_bias = (grad.new_empty(0) if gradient is None else gradient for gradient in found)
    return of_x, of_weight, of_bias


@linear_gradients.register_fake
def _(grad: Tensor, weight: Tensor, saved: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    to_x, to_weight, to_bias = others[-3:]
    return (
        grad.new_empty(saved.shape if to_x else 0, dtype=to_x),
        grad.new_empty(weight.shape if to_weight else 0, dtype=to_weight),
        grad.new_empty(weight.shape[0] if to_bias else 0, dtype=to_bias),
    )


@custom_op("qatrun::observe", mutates_args=(), tags=_TAGS)
def observe(y: Tensor, x: Tensor, weight: Tensor, owner: Tensor) -> Tensor:
    """y, the amaxes of x and weight recorded by the FakeQuantLinear of that number."""
    _find(owner).observe(x, weight)
    return y.clone(memory_format=torch.contiguous_format)


@observe.register_fake
def _(y: Tensor, x: Tensor, weight: Tensor, owner: Tensor) -> Tensor:
    return y.new_empty(y.shape)


@custom_op("qatrun::observe_gradient", mutates_args=(), tags=_TAGS)
def observe_gradient(grad: Tensor, owner: Tensor) -> Tensor:
    """grad, its amax recorded where gradients are quantized."""
    _find(owner).observe_gradient(grad)
    return grad.clone(memory_format=torch.contiguous_format)


@observe_gradient.register_fake
def _(grad: Tensor, owner: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


def _keep_owner(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[-1])


def _observe_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return observe_gradient(grad, *ctx.saved_tensors), None, None, None


observe.register_autograd(_observe_backward, setup_context=_keep_owner)
