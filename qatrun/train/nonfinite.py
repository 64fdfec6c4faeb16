"""When a loss or gradient turns NaN or Inf: say which tensors went bad first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qatrun.train.sharding import whole

SHOWN = 3


def first_bad_tensors(model: nn.Module, micro_batches: Iterable[Tensor]) -> list[str]:
    """Names of what is not finite, in the order in which it arises: parameters, then outputs of modules in a forward
    over the first micro-batch that shows any, then gradients, which the backward reaches from the model's end. Of several
    processes all are to ask."""
    bad = [f"parameter {name}" for name, p in model.named_parameters() if not whole(p.detach()).isfinite().all()]
    bad += next(filter(None, (bad_outputs(model, input_ids) for input_ids in micro_batches)), [])
    bad += [
        f"gradient of {name}"
        for name, p in reversed(list(model.named_parameters()))
        if p.grad is not None and not whole(p.grad).isfinite().all()
    ]
    return bad[:SHOWN]


def bad_outputs(model: nn.Module, input_ids: Tensor) -> list[str]:
    """Leaf modules whose output is not finite, in the order of the forward."""
    bad: list[str] = []

    def check(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            bad.append(f"output of {name}")

    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: check(name, output))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(input_ids=input_ids, use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return bad
