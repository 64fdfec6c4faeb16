"""Weights of experts that transformers holds together in one 3-D parameter, and the names that each has here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

LEAVES = ("gate_up_proj", "up_proj", "down_proj")
# Llama-4's takes tokens that are sorted by expert already; the others are known by what transformers' decorator gives them.
DENSE = ("Llama4TextExperts",)


@dataclass(frozen=True)
class Experts:
    """One 3-D parameter.

    Attributes:
        owner: the module's name.
        leaf: the parameter's name in it.
        num: how many experts.
        shape: (out, in) of each expert's weight.
        transposed: whether it is held the other way round.
    """

    owner: str
    leaf: str
    num: int
    shape: tuple[int, int]
    transposed: bool

    @property
    def linears(self) -> list[str]:
        """The names of the experts' linears."""
        return [f"{self.owner}.{self.leaf}.{index}" for index in range(self.num)]


def named_experts(model: nn.Module) -> dict[str, Experts]:
    """The parameters of a model that hold experts which can be quantized, by name."""
    found = (_experts(name, module) for name, module in model.named_modules())
    return {f"{each.owner}.{each.leaf}": each for parameters in found for each in parameters}


def experts_of_linears(model: nn.Module) -> dict[str, Experts]:
    """Linear -> the parameter that it is a part of, for every expert's linear of a model."""
    return {linear: each for each in named_experts(model).values() for linear in each.linears}


def _experts(name: str, module: nn.Module) -> Iterator[Experts]:
    dense = type(module).__name__ in DENSE
    if not dense and not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
        return
    transposed = dense or bool(module.is_transposed)
    for leaf in LEAVES:
        weight = module._parameters.get(leaf)
        if weight is not None and weight.dim() == 3:
            num, first, second = weight.shape
            yield Experts(name, leaf, num, (second, first) if transposed else (first, second), transposed)
