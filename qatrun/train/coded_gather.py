"""Weights that travel between processes as 8-bit codes, where these say all that a quantized linear needs.

FSDP2 gathers a parameter as it is, in float32. Where rows that are quantized apart come to what the whole would, each
process quantizes those that it has, once for every change of weights or scales, and what is gathered is a byte a value, a
bit a value for where the STE holds the gradient back, and the scales of rows that have their own. Otherwise (a BF16 phase,
a scale taken from the tensor at hand, a step that measures noise) the parameter is gathered. Which of the two may change
between forwards, never between a forward and its backward.

This hooks into FSDP2 as torch's extensions for low precision do, by functions that the local tensor has. FSDP2 keeps the
memory that it gathers into, so at a change it is made to forget it, by attributes that torch does not document; a torch that
has no such attributes gathers parameters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qatrun.quant import CodedWeight, FakeQuantLinear, QTensor
from qatrun.ranks import World

_UNDOCUMENTED = ("_module_info", "_init_extensions", "all_gather_outputs")


class CodedGathers:
    """Of a sharded model, the weights that can travel as codes."""

    def __init__(self, model: nn.Module, world: World) -> None:
        # What lies outside blocks stays gathered from the forward to the end of the backward.
        blocks = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
        self._gathers = [gather for block in blocks for gather in _of_block(block, world)]
        model.register_forward_pre_hook(lambda *_: self._choose(), prepend=True)  # before FSDP's own

    def forget(self) -> None:
        """The weights have changed: their codes are others. Optimizers leave no trace of it on sharded tensors."""
        for gather in self._gathers:
            gather.quantizer.latest.forget()

    def _choose(self) -> None:
        for gather in self._gathers:
            gather.choose()


class _CodedGather:
    """Of one weight, [out, in]."""

    def __init__(self, linear: FakeQuantLinear, of_fsdp: Any) -> None:
        self.linear, self.quantizer, self.of_fsdp = linear, linear.quant.of["weight"], of_fsdp
        self.coded = False

    def choose(self) -> None:
        """Let the next gathers be of codes, or of the parameter."""
        coded = self.quantizer.same_in_parts()
        if self.coded == coded:
            return
        assert isinstance(self.linear.weight, DTensor)
        rows: Any = self.linear.weight._local_tensor
        if coded:
            rows.fsdp_pre_all_gather, rows.fsdp_post_all_gather = partial(self.of_rows, rows), self.of_all
        else:
            del rows.fsdp_pre_all_gather, rows.fsdp_post_all_gather
        self.of_fsdp.all_gather_outputs = []
        vars(self.of_fsdp).pop("_unsharded_param", None)
        self.of_fsdp._init_extensions()
        self.coded = coded

    def of_rows(
        self, rows: Tensor, mesh: object, size: object, stride: object, module: object, policy: object
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """FSDP's `fsdp_pre_all_gather`: (what is gathered of the rows that are here, their scale)."""
        make = partial(self.quantizer.on_grid, rows, None, codes=True, takes_gradient=self.linear.weight.requires_grad)
        on_grid = self.quantizer.latest.get(rows, make, self.quantizer.state.generation())
        others = on_grid.blocked, on_grid.scale if on_grid.scale.dim() else None
        return (on_grid.saved, *(each for each in others if each is not None)), on_grid.scale

    def of_all(
        self, gathered: tuple[Tensor, ...], scale: Tensor, dtype: torch.dtype, *, out: CodedWeight | None = None
    ) -> tuple[CodedWeight, tuple[()]] | None:
        """FSDP's `fsdp_post_all_gather`: the whole weight, in the memory that it was gathered into."""
        codes, *others = gathered
        if scale.dim():
            scale = others.pop()
        whole = QTensor(self.quantizer.grid, None, codes, scale, *others)
        if out is None:
            return CodedWeight(whole, dtype), ()
        out.quantized = whole
        return None


def _of_block(block: FSDPModule, world: World) -> list[_CodedGather]:
    """Of weights whose rows are shared out evenly, in whole bytes of the mask."""
    group: Any = block._get_fsdp_state()._fsdp_param_group
    params = [param for param in group.fsdp_params if all(hasattr(param, name) for name in _UNDOCUMENTED)]
    return [
        _CodedGather(linear, param)
        for param in params
        if isinstance(linear := param._module_info.module, FakeQuantLinear)
        if param._module_info.param_name == "weight" and not param._module_info.shared_modules
        if not linear.transposed and linear.weight.shape[0] % world.size == 0
        if linear.weight.numel() // world.size % 8 == 0
    ]
