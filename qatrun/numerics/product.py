"""Products of bfloat16 matrices on CPUs that have no unit for them.

What such a unit computes: operands rounded to bfloat16, their products, which are exact in float32, summed in float32, the
sum rounded to bfloat16. A CPU without one (x86-64 without AVX512-BF16 or AMX, Arm without BF16) gets the same from float32
products of the same operands, where PyTorch itself falls back to a loop, up to 100 times slower. Results of the two ways
differ by the order of the sums.

    bfloat16_products()     a context in which a model's own products are made the way that suits this CPU
    product_dtype(dtype)    what to convert operands to before a product that is made here

What this leaves out: within `scaled_dot_product_attention` the probabilities stay float32, where a bfloat16 kernel rounds
them before it multiplies them by the values.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Way = Literal["native", "float32"]

_LIMITED_TO = ("AVX512_CORE_BF16", "AVX10", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "ALL", "DEFAULT")
# The products that autocast runs in bfloat16.
_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.linear,
        F.bilinear,
        F.scaled_dot_product_attention,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.mv,
        torch.addmm,
        torch.addbmm,
        torch.baddbmm,
        torch.einsum,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
        Tensor.mm,
        Tensor.bmm,
        Tensor.mv,
        Tensor.addmm,
        Tensor.addbmm,
        Tensor.baddbmm,
    }
)


@cache
def bfloat16_way() -> Way:
    """How this CPU makes products of bfloat16 matrices: in a unit of its own, or in float32."""
    if not _onednn_takes_bfloat16():
        return "float32"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "native"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()  # oneDNN obeys it without a word
    has_unit = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "native" if has_unit and limit.startswith(_LIMITED_TO) else "float32"


def _onednn_takes_bfloat16() -> bool:
    """Whether PyTorch hands such products to oneDNN, on x86-64 (with AVX-512 of any kind) or on Arm (with its extension)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What operands of a product in `dtype` are converted to; the product is rounded to `dtype` after."""
    in_float32 = dtype == torch.bfloat16 and device.type == "cpu" and bfloat16_way() == "float32"
    return torch.float32 if in_float32 else dtype


def bfloat16_products() -> AbstractContextManager[object]:
    """A context in which bfloat16 products, under autocast or of bfloat16 tensors, are made the way that suits this CPU."""
    return nullcontext() if bfloat16_way() == "native" else Float32Products()


def recomputed_products() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """For `torch.utils.checkpoint` as its `context_fn`: a backward does not run in the context of its forward."""
    return nullcontext(), bfloat16_products()


class Float32Products(TorchFunctionMode):
    """Makes the bfloat16 products of CPU tensors in float32, gradients included: those of the conversions round them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not _is_in_bfloat16(args, kwargs):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            product = func(*map(_rounded, args), **{name: _rounded(value) for name, value in kwargs.items()})
        return product.to(torch.bfloat16)


def _is_in_bfloat16(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    operands = list(_floating((*args, *kwargs.values())))
    if not operands or operands[0].device.type != "cpu" or "out" in kwargs:
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        return all(operand.dtype != torch.float64 for operand in operands)  # as autocast: float64 is left alone
    return operands[0].dtype == torch.bfloat16


def _floating(values: Iterable[Any]) -> Iterator[Tensor]:
    """The floating-point tensors among the arguments of a product, or in a list of its operands."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, list | tuple):
            yield from _floating(value)


def _rounded(value: Any) -> Any:
    """A floating-point tensor rounded to bfloat16, in float32; a list of operands likewise; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(torch.bfloat16).to(torch.float32) if value.is_floating_point() else value
    return type(value)(map(_rounded, value)) if isinstance(value, list | tuple) else value
