"""A model whose parameters, gradients and optimizer state lie in parts on several processes: FSDP2 of torch.

Each block's parameters are gathered when it computes and given back after. They are gathered in the dtype that the
optimizer updates, and quantized after that: rounded twice, 1 to 3 % of the values would land elsewhere than what is
exported from the float32 masters. Gradients are summed over the processes, never averaged: what a micro-batch adds is
divided by the targets of the whole batch already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from qatrun.ranks import World


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Leave on each process its part of the model, on this device.

    Args:
        model: on the process that leads, with its weights; on others its architecture will do, on the meta device.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    weights = {name: p.detach() for name, p in model.named_parameters()} if world.leads else {}
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what is left, in one group: tied weights must not lie in two
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else a scaled sum, which gloo does not have
    if any(world.gather(next(model.parameters()).is_meta)):
        _hand_out(model, weights, world, device)


@torch.no_grad()
def _hand_out(model: nn.Module, weights: Mapping[str, Tensor], world: World, device: torch.device) -> None:
    """Give each process its part of what the first has whole, a tensor at a time."""
    buffers = world.first(lambda: {name: (buffer.shape, buffer.dtype) for name, buffer in model.named_buffers()})
    if not world.leads:
        model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        full = _from_first(weights.get(name), parameter.shape, parameter.dtype, world, device)
        part = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    for name, (shape, dtype) in buffers.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._buffers[leaf] = _from_first(module._buffers.get(leaf), shape, dtype, world, device)


def _from_first(x: Tensor | None, shape: torch.Size, dtype: torch.dtype, world: World, device: torch.device) -> Tensor:
    """The first process's tensor on all of them."""
    full = x.to(device) if world.leads and x is not None else torch.empty(shape, dtype=dtype, device=device)
    dist.broadcast(full, src=0)
    return full


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
