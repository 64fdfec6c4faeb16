"""What each of a model's linears costs when it is quantized, in nats a token.

    one backward     1/2 sum g^2 dy^2        over the outputs y of a linear, dy = Q(linear)(x) - linear(x), g = d(NLL)/dy
    one at a time    KL(plain || quantized)  with only these linears quantized

The first is the second order of the second, with the diagonal of the Fisher information for the Hessian: a forward and a
backward over the text for all linears together, where the second takes a forward for each. It finds the right order and a
constant share of the size (ModelOpt's AutoQuantize scores layers so).

What is kept or quantized together is an input group, the linears that read one tensor (q/k/v, gate/up): engines fuse them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatrun.quant.attach import attached_state
from qatrun.quant.plan import QuantPlan
from qatrun.quant.state import Mode

LOGITS_AT_ONCE = 2**22  # that are compared in float64


@dataclass(frozen=True)
class Cost:
    """Of some linears on some text: sums.

    Attributes:
        nats: what quantizing them costs.
        signal, noise: energies of their outputs, and of what quantization changes in them.
    """

    nats: float
    signal: float
    noise: float


def input_groups(plan: QuantPlan) -> dict[str, tuple[str, ...]]:
    """First reader of a tensor -> the plan's linears that read it."""
    groups: dict[str, list[str]] = {}
    for name in plan.linears:
        groups.setdefault(plan.input_group[name], []).append(name)
    return {linears[0]: tuple(linears) for linears in groups.values()}


@contextmanager
def quantizing(model: nn.Module, linears: Iterable[str]) -> Iterator[None]:
    """Only these of an attached model's linears quantize; the others compute as before it was attached."""

    def quantized(module: Any, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        return _quantized(module, args)

    handles = [model.get_submodule(name).register_forward_hook(quantized) for name in linears]
    try:
        with attached_state(model).computing(Mode.OFF):
            yield
    finally:
        for handle in handles:
            handle.remove()


def costs_by_one_backward(model: Any, linears: Iterable[str], input_ids: Tensor, labels: Tensor) -> dict[str, Cost]:
    """Of each of these linears of an attached, calibrated model; its gradients are left as they were.

    Args:
        input_ids: [num, seq_len], on the model's device.
        labels: the same shape, not shifted.
    """
    found: dict[str, Tensor] = {}  # [3] float64: nats, signal, noise

    def watch(name: str, module: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        with torch.no_grad():
            change = _quantized(module, args) - y
        energies = torch.stack([_energy(y.detach()), _energy(change)])
        found[name] = found.get(name, 0.0) + torch.cat([energies.new_zeros(1), energies])

        def weigh(gradient: Tensor) -> None:
            found[name][0] += _energy(gradient.float() * change.float()) / 2

        y.requires_grad_().register_hook(weigh)  # the graph begins with the first

    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [model.get_submodule(name).register_forward_hook(partial(watch, name)) for name in linears]
    model.requires_grad_(False)  # of weights no gradient is wanted
    try:
        with attached_state(model).computing(Mode.OFF), torch.enable_grad():
            logits = model(input_ids=input_ids, use_cache=False).logits
            predictions, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            F.cross_entropy(predictions, targets, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_()
    return {name: Cost(*values.tolist()) for name, values in found.items()}


@torch.no_grad()
def costs_one_at_a_time(
    model: Any, groups: Mapping[str, tuple[str, ...]], input_ids: Tensor, labels: Tensor
) -> Iterator[tuple[str, Cost]]:
    """The KL of each group of linears, one after the other; arguments as of `costs_by_one_backward`."""
    if not groups:
        return
    with quantizing(model, ()):
        plain = model(input_ids=input_ids, use_cache=False).logits
    for name, linears in groups.items():
        with quantizing(model, linears), _measuring_noise(model, linears) as energies:
            quantized = model(input_ids=input_ids, use_cache=False).logits
        yield name, Cost(float(divergences(plain, quantized, labels)[:, 0].sum()), *energies.tolist())


@torch.no_grad()
def divergences(plain: Tensor, quantized: Tensor, labels: Tensor) -> Tensor:
    """[num, 2] float64, of each sequence: KL(plain || quantized) summed over the tokens that have a target, and the rise of
    their NLL.

    Args:
        plain, quantized: [num, seq_len, vocab] logits.
        labels: [num, seq_len], not shifted.
    """
    at_once = max(1, LOGITS_AT_ONCE // plain.shape[-1])
    sums = []
    for of_plain, of_quantized, targets in zip(plain, quantized, labels, strict=True):
        parts = [x[:-1].split(at_once) for x in (of_plain, of_quantized)]
        kl = rise = torch.zeros((), dtype=torch.float64, device=plain.device)
        for p, q, target in zip(*parts, targets[1:].split(at_once), strict=True):
            counted = target >= 0
            log_p, log_q = (x[counted].double().log_softmax(-1) for x in (p, q))
            kl = kl + (log_p.exp() * (log_p - log_q)).sum()
            rise = rise + (log_p - log_q).gather(-1, target[counted, None]).sum()
        sums.append(torch.stack([kl, rise]))
    return torch.stack(sums).cpu()


@contextmanager
def _measuring_noise(model: nn.Module, linears: Iterable[str]) -> Iterator[Tensor]:
    """[2] float64: signal and noise of these linears' outputs, filled in while they quantize."""
    energies = torch.zeros(2, dtype=torch.float64)

    def measure(module: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        plain = module.plain_class.forward(module, *args)
        energies.add_(torch.stack([_energy(plain), _energy(y - plain)]).cpu())

    handles = [model.get_submodule(name).register_forward_hook(measure) for name in linears]
    try:
        yield energies
    finally:
        for handle in handles:
            handle.remove()


def _quantized(module: Any, args: tuple[Tensor, ...]) -> Tensor:
    """What a linear gives when it quantizes, whatever the others do; its hooks are not asked."""
    with module.quant.state.computing(Mode.QUANTIZE):
        y: Tensor = type(module).forward(module, *args)
    return y


def _energy(x: Tensor) -> Tensor:
    """[] float64, the sum of squares."""
    return x.float().square().sum(dtype=torch.float64)
