"""How much of a model a plan quantizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qatrun.formats import Role
from qatrun.quant.expert_weights import named_experts
from qatrun.quant.linears import TIED, Survey, described, named_linears, survey
from qatrun.quant.plan import QuantPlan, Schemes
from qatrun.scheme import Scheme


@dataclass(frozen=True)
class Share:
    """The linears of a plan that have the same schemes.

    Attributes:
        weights: how many they hold.
    """

    schemes: Schemes
    linears: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Coverage:
    """How much of a model a plan quantizes. FLOPs are those of the linears: proportional to their weights' sizes, but where
    there are experts, of which a token sees few.

    Attributes:
        num_experts: of the linears, those that are an expert's.
        uncovered_experts: names of 3-D expert parameters that no plan can quantize.
        unfit: linear -> why no plan can quantize it; the output head aside.
        shares: of the quantized linears, by their schemes.
    """

    num_quantized: int
    num_linears: int
    quantized_weights: int
    linear_weights: int
    num_experts: int
    uncovered_experts: tuple[str, ...]
    unfit: Mapping[str, str]
    shares: tuple[Share, ...]

    @property
    def flops_share(self) -> float:
        return self.quantized_weights / self.linear_weights if self.linear_weights else 0.0

    @property
    def measure(self) -> str:
        """What shares are of."""
        return "linear weights" if self.num_experts else "linear FLOPs"

    def __str__(self) -> str:
        text = f"{self.num_quantized} of {self.num_linears} linears, {self.flops_share:.0%} of {self.measure} quantized"
        weights: dict[str, int] = {}
        for share in self.shares:
            name = share.schemes["weight"].format
            weights[name] = weights.get(name, 0) + share.weights
        if len(weights) > 1:
            text += f" ({', '.join(f'{name} {number / self.linear_weights:.0%}' for name, number in weights.items())})"
        if self.uncovered_experts:
            text += f"; not covered: {len(self.uncovered_experts)} expert tensors such as {self.uncovered_experts[0]}"
        if self.unfit:
            text += f"; left in BF16: {described(self.unfit)}"
        return text


def coverage(model: nn.Module, plan: QuantPlan, seen: Survey | None = None) -> Coverage:
    """What share of the model's linears and linear FLOPs the plan quantizes."""
    seen = survey(model) if seen is None else seen
    sizes = {name: module.get_parameter("weight").numel() for name, module in named_linears(model).items()}
    experts = named_experts(model)
    sizes |= {name: math.prod(each.shape) for each in experts.values() for name in each.linears}
    tied = {name: TIED for name in seen.tied if name not in plan.linears}
    alike: dict[tuple[tuple[Role, Scheme], ...], list[str]] = {}
    for name, schemes in plan.schemes.items():
        alike.setdefault(tuple(schemes.items()), []).append(name)
    return Coverage(
        num_quantized=len(plan.linears),
        num_linears=len(sizes),
        quantized_weights=sum(sizes[name] for name in plan.linears),
        linear_weights=sum(sizes.values()),
        num_experts=sum(each.num for each in experts.values()),
        uncovered_experts=tuple(
            name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name and name not in experts
        ),
        unfit={name: reason for name, reason in (tied | dict(seen.unfit)).items() if name != seen.head},
        shares=tuple(
            Share(dict(schemes), tuple(names), sum(sizes[name] for name in names)) for schemes, names in alike.items()
        ),
    )
