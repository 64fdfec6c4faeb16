"""A model whose parameters, gradients and optimizer state lie in parts on several processes: FSDP2 of torch.

Each block's parameters are gathered when it computes and given back after. They are gathered in the dtype that the
optimizer updates, and quantized after that: rounded twice, 1 to 3 % of the values would land elsewhere than what is
exported from the float32 masters. Gradients are summed over the processes, never averaged: what a micro-batch adds is
divided by the targets of the whole batch already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from qatrun.ranks import World


def shard(model: nn.Module, world: World, device: torch.device, *, reshard_after_forward: bool) -> None:
    """Leave on each process its part of the model, on this device.

    Args:
        reshard_after_forward: give a block's weights back between its forward and its backward.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)  # what is left, in one group: tied weights must not lie in two
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else a scaled sum, which gloo does not have


def own_part(x: Tensor) -> Tensor:
    """What of a tensor lies on this process: whole rows of it, or all."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor; every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The `state_dict` of a sharded model as one process would have it, on the CPU of the first; elsewhere empty."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks: the outermost modules of the classes that the model says must stay in one piece."""
    whole_classes = set(getattr(model, "_no_split_modules", None) or ())

    def search(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if type(child).__name__ in whole_classes:
                yield child
            else:
                yield from search(child)

    return search(model)
