"""A weight that is here as its codes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qatrun.quant.qtensor import QTensor

_SAME = (torch.ops.aten.detach.default, torch.ops.aten.as_strided.default)


class CodedWeight(Tensor):
    """Stands for a parameter [out, in] whose values are elsewhere: it has its shape and dtype and takes its gradient, and a
    quantized linear computes with its codes. Whoever asks for its values is refused.

    Attributes:
        quantized: [out, in], as codes.
    """

    quantized: QTensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, quantized: QTensor, dtype: torch.dtype) -> CodedWeight:
        codes = quantized.saved
        made: CodedWeight = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        made.quantized = quantized
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _SAME:  # as FSDP makes a parameter of it, [out, in] again
            return CodedWeight(args[0].quantized, args[0].dtype)
        raise RuntimeError(f"{func} of a weight that is here as codes alone, for its quantized linear")

    def __repr__(self) -> str:  # type: ignore[override]  # Tensor's own would print values
        return f"CodedWeight({list(self.shape)}, {self.quantized.grid.format.name})"
