"""Which linears of a model are quantized, and how: decided once, before anything is changed.

A plan is data. It is made from a recipe and a model (a model on the meta device will do), printed as coverage by
`qatrun check`, applied by `attach`, and saved beside the quantized weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from qatrun.errors import InputError, Problem
from qatrun.formats import FORMATS, Role
from qatrun.numerics import Clip, Ste
from qatrun.quant.linears import TIED, Survey, described, named_linears, survey
from qatrun.recipe import QatConfig, ResolvedRole, SavedActivations, matching_names

GRANULARITIES: Mapping[Role, tuple[str, ...]] = {
    "weight": ("per_tensor", "per_channel"),
    "input": ("per_tensor", "per_token"),
    "grad_output": ("per_tensor",),
}


@dataclass(frozen=True)
class QuantPlan:
    """The linears to quantize and the treatment of each role, the same for all of them.

    Attributes:
        linears: module names, in the model's order.
        input_group: linear -> first linear of the model (in the plan or not) that reads the same tensor. The linears of
            a group share one input quantizer.
        roles: "weight" and "input", and "grad_output" where the backward is quantized too.
        clip: whether values saturate at the target or at the format's own largest value.
        ste: gradient of the rounding: all passes, or nothing passes where the value saturated.
        saved_activations: what linears keep for the backward; changes memory and time, no result.
    """

    linears: tuple[str, ...]
    input_group: Mapping[str, str]
    roles: Mapping[Role, ResolvedRole]
    clip: Clip = "format"
    ste: Ste = "clipped"
    saved_activations: SavedActivations = "values"

    def slots(self) -> Iterator[tuple[str, ResolvedRole]]:
        """(name, treatment) of every quantized tensor: one an input group, one a weight, one an output gradient."""
        for group in dict.fromkeys(self.input_group[name] for name in self.linears):
            yield f"{group}:input", self.roles["input"]
        for name in self.linears:
            yield f"{name}:weight", self.roles["weight"]
            if "grad_output" in self.roles:
                yield f"{name}:grad_output", self.roles["grad_output"]

    def slot_name(self, linear: str, role: Role) -> str:
        """Name of the quantizer of one of a linear's tensors."""
        return f"{self.input_group[linear] if role == 'input' else linear}:{role}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        return {
            "linears": list(self.linears),
            "input_group": dict(self.input_group),
            "roles": {
                role: {**asdict(spec), "scaling": spec.scaling.model_dump()} for role, spec in self.roles.items()
            },
            "clip": self.clip,
            "ste": self.ste,
            "saved_activations": self.saved_activations,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantPlan:
        """The plan that `to_dict` described.

        Raises:
            ValueError: it describes none; says which key is wrong.
        """
        if missing := [field.name for field in fields(cls) if field.name not in data]:
            raise ValueError(f"lacks {', '.join(missing)}")
        plan = TypeAdapter(cls).validate_python(data)
        if problem := plan._inconsistency():
            raise ValueError(problem)
        return plan

    def _inconsistency(self) -> str | None:
        if not self.linears or len(set(self.linears)) < len(self.linears):
            return "linears: must name one or more, each once"
        if set(self.input_group) != set(self.linears):
            return "input_group: must name a group for each of the linears"
        if not {"weight", "input"} <= set(self.roles):
            return "roles: must hold weight and input"
        for role, spec in self.roles.items():
            if spec.role != role or spec.format not in FORMATS:
                return f"roles.{role}: role {spec.role!r} in format {spec.format!r}"
            if spec.granularity not in GRANULARITIES[role]:
                return f"roles.{role}.granularity: no {role} has a scale {spec.granularity}"
            if not 0 < spec.target_amax <= FORMATS[spec.format].max_finite:
                return f"roles.{role}.target_amax: {spec.target_amax:g} is no value of {spec.format}"
        return None


@dataclass(frozen=True)
class Coverage:
    """How much of a model a plan quantizes. FLOPs are those of the linears: proportional to their weights' sizes.

    Attributes:
        uncovered_experts: names of 3-D expert parameters, which no plan can quantize yet.
        unfit: linear -> why no plan can quantize it; the output head aside.
    """

    num_quantized: int
    num_linears: int
    quantized_weights: int
    linear_weights: int
    uncovered_experts: tuple[str, ...]
    unfit: Mapping[str, str]

    @property
    def flops_share(self) -> float:
        return self.quantized_weights / self.linear_weights if self.linear_weights else 0.0

    def __str__(self) -> str:
        text = f"{self.num_quantized} of {self.num_linears} linears, {self.flops_share:.0%} of linear FLOPs quantized"
        if self.uncovered_experts:
            text += f"; not covered: {len(self.uncovered_experts)} expert tensors such as {self.uncovered_experts[0]}"
        if self.unfit:
            text += f"; left in BF16: {described(self.unfit)}"
        return text


def make_plan(model: nn.Module, qat: QatConfig, seen: Survey | None = None) -> QuantPlan:
    """The plan that a recipe's `qat` section means for this model.

    Linears that cannot be quantized are left out. So are the output head and what else is tied to the embeddings, unless
    `targets` names them.

    Args:
        seen: the model's survey, where it was made already.
    Raises:
        InputError: a pattern of `targets` or `ignore` that matches no linear, or nothing left to quantize.
    """
    linears = named_linears(model)
    seen = survey(model) if seen is None else seen
    problems: list[Problem] = []
    if seen.complaint is not None:
        problems.append(Problem(f"the model does not run on text alone: {seen.complaint}", key="model.path"))
    if qat.targets is None:
        chosen = {name for name in linears if name != seen.head and name not in seen.tied}
    else:
        chosen = _matching(linears, qat.targets, "qat.targets", problems)
    chosen -= _matching(linears, qat.ignore, "qat.ignore", problems)
    chosen -= _edge_blocks(linears, qat.skip_blocks.first, qat.skip_blocks.last)
    unfit = {name: seen.unfit[name] for name in linears if name in chosen and name in seen.unfit}
    chosen -= unfit.keys()
    if not problems and not chosen:
        cannot = f"; cannot be quantized: {described(unfit)}" if unfit else ""
        problems.append(Problem(f"nothing is left to quantize after ignore and skip_blocks{cannot}", key="qat.targets"))
    if problems:
        raise InputError(problems)
    roles: dict[Role, ResolvedRole] = {spec.role: spec for spec in qat.roles}
    names = tuple(name for name in linears if name in chosen)
    input_group = {name: seen.first_reader[name] for name in names}
    return QuantPlan(names, input_group, roles, qat.clip, qat.ste, qat.saved_activations)


def coverage(model: nn.Module, plan: QuantPlan, seen: Survey | None = None) -> Coverage:
    """What share of the model's linears and linear FLOPs the plan quantizes."""
    seen = survey(model) if seen is None else seen
    sizes = {name: module.get_parameter("weight").numel() for name, module in named_linears(model).items()}
    tied = {name: TIED for name in seen.tied if name not in plan.linears}
    return Coverage(
        num_quantized=len(plan.linears),
        num_linears=len(sizes),
        quantized_weights=sum(sizes[name] for name in plan.linears),
        linear_weights=sum(sizes.values()),
        uncovered_experts=tuple(n for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n),
        unfit={name: reason for name, reason in (tied | dict(seen.unfit)).items() if name != seen.head},
    )


def _matching(linears: Mapping[str, nn.Module], patterns: Sequence[str], key: str, problems: list[Problem]) -> set[str]:
    """Names that any pattern matches: a name, a glob, or `re:` and a regular expression that matches in full."""
    matched: set[str] = set()
    for pattern in patterns:
        try:
            hits = matching_names(pattern, linears)
        except ValueError as error:
            problems.append(Problem(str(error), key=key))
            continue
        if not hits:
            close = get_close_matches(pattern, linears, n=1, cutoff=0.5)
            nearest = f"did you mean '{close[0]}'?" if close else f"names look like '{next(iter(linears), 'none')}'"
            problems.append(Problem(f"pattern '{pattern}' matches no linear ({nearest})", key=key))
        matched |= hits
    return matched


def _edge_blocks(linears: Mapping[str, nn.Module], first: int, last: int) -> set[str]:
    """Names of the linears in the first and last transformer blocks. A block's index is the first number in a name."""
    block = {name: int(m.group(1)) for name in linears if (m := re.search(r"\.(\d+)\.", name))}
    num_blocks = max(block.values(), default=-1) + 1
    return {name for name, index in block.items() if index < first or index >= num_blocks - last}
