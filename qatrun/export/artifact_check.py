"""Every tensor of a quantized folder against its plan and its architecture, before a kernel sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from qatrun.numerics import GRIDS, Grid
from qatrun.quant import Experts, QuantPlan, experts_of_linears
from qatrun.scheme import GRANULARITIES

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it a reciprocal may overflow


def problems(tensors: Mapping[str, Tensor], plan: QuantPlan, skeleton: nn.Module, dtype: torch.dtype) -> Iterator[str]:
    """A sentence on every tensor that is not what plan and architecture ask for: kernels would read past it, or take its
    bytes for another number."""
    expected, experts = skeleton.state_dict(), experts_of_linears(skeleton)
    planned = set(plan.linears)
    for name in plan.linears:
        shape = _effective_shape(name, expected, skeleton, experts)
        if shape is None:
            yield f"the plan names {name}, which is no linear of this model"
            continue
        if name in experts and not planned.issuperset(experts[name].linears):
            yield f"the plan names {name}, but not all experts of that parameter"
        scheme = plan.schemes[name]["weight"]
        yield from _codes_problems(f"{name}.codes", tensors, shape, GRIDS[scheme.format])
        yield from _scale_problems(
            f"{name}.weight_scale", tensors, GRANULARITIES[scheme.granularity].scale_shape(shape)
        )
        yield from _scale_problems(f"{name}.input_scale", tensors, ())
        if not plan.schemes[name]["input"].symmetric:
            yield from _zero_point_problems(f"{name}.input_zero_point", tensors)
    leaves = {f"{name}.{leaf}" for name in plan.linears for leaf in ("codes", "weight_scale", "input_scale")}
    leaves |= {f"{name}.input_zero_point" for name in plan.linears if not plan.schemes[name]["input"].symmetric}
    replaced = {f"{experts[n].owner}.{experts[n].leaf}" if n in experts else f"{n}.weight" for n in plan.linears}
    for name in tensors.keys() - leaves:
        stored, asked = tensors[name], expected.get(name)
        if asked is None or name in replaced:
            yield f"{name} is no tensor of this model"
        elif stored.shape != asked.shape or (asked.is_floating_point() and stored.dtype != dtype):
            yield f"{name} must be {_shown(dtype, asked.shape)} ({_got(stored)})"
        elif stored.is_floating_point() and not stored.isfinite().all():
            yield f"{name} is not finite"


def _effective_shape(
    name: str, expected: Mapping[str, Tensor], skeleton: nn.Module, experts: Mapping[str, Experts]
) -> tuple[int, ...] | None:
    """[out, in] of the weight of a linear; None where there is no such linear."""
    if name in experts:
        return experts[name].shape
    weight = expected.get(f"{name}.weight")
    if weight is None or weight.dim() != 2:
        return None
    transposed = not isinstance(skeleton.get_submodule(name), nn.Linear)
    return (*reversed(weight.shape),) if transposed else (*weight.shape,)


def _codes_problems(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...], grid: Grid) -> Iterator[str]:
    codes, dtype = tensors.get(name), grid.code_dtype
    if codes is None or codes.dtype != dtype or codes.shape != shape:
        yield f"{name} must be {_shown(dtype, shape)}, codes of {grid.format.name} ({_got(codes)})"
    elif not grid.decode(codes).isfinite().all():
        yield f"{name} holds codes of {grid.format.name} that are NaN or Inf"


def _scale_problems(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Iterator[str]:
    scale = tensors.get(name)
    right = scale is not None and scale.dtype == torch.float32 and scale.shape == shape
    if scale is None or not right or not ((scale >= SMALLEST_SCALE) & scale.isfinite()).all():
        yield f"{name} must be {_shown(torch.float32, shape)}, positive and finite ({_got(scale)})"


def _zero_point_problems(name: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    zero = tensors.get(name)
    if zero is None or zero.dtype != torch.int8 or zero.dim():
        yield f"{name} must be {_shown(torch.int8, ())} ({_got(zero)})"


def _shown(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} of shape {list(shape)}"


def _got(tensor: Tensor | None) -> str:
    if tensor is None:
        return "it is missing"
    known = tensor.numel() and not tensor.is_complex()
    values = f", {tensor.double().min().item():g} .. {tensor.double().max().item():g}" if known else ""
    return f"got {_shown(tensor.dtype, tensor.shape)}{values}"
