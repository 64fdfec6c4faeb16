"""What each of a model's linears costs when it is quantized, in nats a token.

    one backward     1/2 sum g^2 dy^2        over the outputs y of a linear, dy = Q(linear)(x) - linear(x), g = d(NLL)/dy
    one at a time    KL(plain || quantized)  with only these linears quantized

The first is the second order of the second, with the diagonal of the Fisher information for the Hessian: a forward and a
backward over the text for all linears together, where the second takes a forward for each. It finds the right order and a
constant share of the size (ModelOpt's AutoQuantize scores layers so).

What is kept or quantized together is an input group, the linears that read one tensor (q/k/v, gate/up): engines fuse them.
The experts of a module that holds them in 3-D parameters are one, too. Costs are of modules: a linear, or such experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatrun.quant.attach import attached_state
from qatrun.quant.expert_weights import experts_of_linears
from qatrun.quant.hooks import seeing_outputs
from qatrun.quant.plan import QuantPlan
from qatrun.quant.state import Mode, QuantState

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


@dataclass(frozen=True)
class Group:
    """What is quantized or kept together.

    Attributes:
        modules: whose outputs show what it costs.
        names: of its linears and parameters of experts, as patterns know them.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...]
    num_weights: int


def input_groups(model: nn.Module, plan: QuantPlan) -> dict[str, Group]:
    """The groups of a plan by the name of the first module."""
    experts = experts_of_linears(model)
    members: dict[str, list[str]] = {}
    for linear in plan.linears:
        key = experts[linear].owner if linear in experts else plan.input_group[linear]
        members.setdefault(key, []).append(linear)
    groups: dict[str, Group] = {}
    for linears in members.values():
        of = {linear: experts.get(linear) for linear in linears}
        modules = dict.fromkeys(linear if each is None else each.owner for linear, each in of.items())
        names = dict.fromkeys(linear if each is None else f"{each.owner}.{each.leaf}" for linear, each in of.items())
        num_weights = sum(
            model.get_parameter(f"{linear}.weight").numel() if each is None else math.prod(each.shape)
            for linear, each in of.items()
        )
        groups[next(iter(modules))] = Group(tuple(modules), tuple(names), num_weights)
    return groups


@contextmanager
def quantizing(model: nn.Module, modules: Iterable[str]) -> Iterator[None]:
    """Only these of an attached model's modules quantize; the others compute as before it was attached."""
    state = attached_state(model)

    def quantized(module: nn.Module, args: Any, kwargs: Any, _: Tensor) -> Tensor:
        return _computed(module, state, Mode.QUANTIZE, args, kwargs)

    with seeing_outputs(model, dict.fromkeys(modules, quantized)), state.computing(Mode.OFF):
        yield


def costs_by_one_backward(model: Any, modules: Iterable[str], input_ids: Tensor, labels: Tensor) -> dict[str, Cost]:
    """Of each of these modules of an attached, calibrated model; its gradients are left as they were.

    Args:
        input_ids: [num, seq_len], on the model's device.
        labels: the same shape, not shifted.
    """
    state, found = attached_state(model), dict[str, Tensor]()  # [3] float64: nats, signal, noise

    def watch(name: str, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        with torch.no_grad():
            change = _computed(module, state, Mode.QUANTIZE, args, kwargs) - y
        energies = torch.stack([_energy(y.detach()), _energy(change)])
        found[name] = found.get(name, 0.0) + torch.cat([energies.new_zeros(1), energies])

        def weigh(gradient: Tensor) -> None:
            found[name][0] += _energy(gradient.float() * change.float()) / 2

        y.requires_grad_().register_hook(weigh)  # the graph begins with the first

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # of weights no gradient is wanted
    try:
        hooks = {name: partial(watch, name) for name in modules}
        with seeing_outputs(model, hooks), state.computing(Mode.OFF), torch.enable_grad():
            logits = model(input_ids=input_ids, use_cache=False).logits
            predictions, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            F.cross_entropy(predictions, targets, reduction="sum").backward()
    finally:
        for parameter in trained:
            parameter.requires_grad_()
    return {name: Cost(*values.tolist()) for name, values in found.items()}


@torch.no_grad()
def costs_one_at_a_time(
    model: Any, groups: Mapping[str, Iterable[str]], input_ids: Tensor, labels: Tensor
) -> Iterator[tuple[str, Cost]]:
    """The KL of each group of modules, one after the other; arguments as of `costs_by_one_backward`."""
    if not groups:
        return
    state = attached_state(model)
    with quantizing(model, ()):
        plain = model(input_ids=input_ids, use_cache=False).logits
    for name, modules in groups.items():
        energies = torch.zeros(2, dtype=torch.float64, device=plain.device)

        def measure(module: nn.Module, args: Any, kwargs: Any, y: Tensor, into: Tensor = energies) -> None:
            without = _computed(module, state, Mode.OFF, args, kwargs)
            into += torch.stack([_energy(without), _energy(y - without)])

        with quantizing(model, modules), seeing_outputs(model, dict.fromkeys(modules, measure)):
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


def _computed(module: nn.Module, state: QuantState, mode: Mode, args: Any, kwargs: Any) -> Tensor:
    """What a module gives in that mode, whatever the others do; its hooks are not asked."""
    with state.computing(mode):
        y: Tensor = type(module).forward(module, *args, **kwargs)
    return y


def _energy(x: Tensor) -> Tensor:
    """[] float64, the sum of squares."""
    return x.float().square().sum(dtype=torch.float64)
