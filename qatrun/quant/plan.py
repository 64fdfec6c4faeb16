"""Which linears of a model are quantized, and how: decided once, before anything is changed.

A plan is data. It is made from a recipe and a model (a model on the meta device will do), printed as coverage by
`qatrun check`, applied by `attach`, and saved beside the quantized weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter
from torch import nn
from typing_extensions import TypedDict  # pydantic reads it before Python 3.12

from qatrun.errors import InputError, Problem
from qatrun.formats import FORMATS, ROLES, Role
from qatrun.patterns import matching_names
from qatrun.quant.expert_weights import experts_of_linears, named_experts
from qatrun.quant.linears import Survey, described, effective_shape, named_linears, survey
from qatrun.scheme import GRANULARITIES, RULES, Assignment, Scheme, Slot, Wanted
from qatrun.text import suggestion

Schemes = Mapping[Role, Scheme]


class _Described(TypedDict):
    """A plan as plain data."""

    schemes: list[Scheme]
    linears: dict[str, dict[Role, int]]
    input_group: dict[str, str]
    saves_codes: bool


@dataclass(frozen=True)
class QuantPlan:
    """The linears to quantize, and how each of their tensors is.

    Attributes:
        schemes: linear, in the model's order -> its schemes: "weight" and "input", and "grad_output" where its backward
            is quantized too.
        input_group: linear -> first linear of the model (in the plan or not) that reads the same tensor.
        saves_codes: whether linears keep 8-bit codes for the backward instead of grid values; changes memory and time, no
            result.
    """

    schemes: Mapping[str, Schemes]
    input_group: Mapping[str, str]
    saves_codes: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.schemes)

    def slot(self, linear: str, role: Role) -> Slot:
        """That of one of a linear's tensors. Linears that read the same tensor by the same scheme share its slot."""
        return self._input_slots[linear] if role == "input" else Slot(linear, role)

    def slots(self) -> dict[Slot, Scheme]:
        """Every quantized tensor: the inputs, then each linear's weight and output gradient."""
        inputs = {slot: self.schemes[name]["input"] for name, slot in self._input_slots.items()}
        return inputs | {
            Slot(name, role): self.schemes[name][role]
            for name in self.linears
            for role in ROLES
            if role != "input" and role in self.schemes[name]
        }

    def observed_as(self) -> dict[Slot, Slot]:
        """Slot -> the one that records the same tensor under a plan that splits no input."""
        return {
            slot: slot._replace(linear=self.input_group.get(slot.linear, slot.linear)) if slot.role == "input" else slot
            for slot in self.slots()
        }

    @cached_property
    def _input_slots(self) -> dict[str, Slot]:
        slots: dict[tuple[str, Scheme], Slot] = {}
        named: set[str] = set()
        for name in self.linears:
            group, scheme = self.input_group[name], self.schemes[name]["input"]
            # Where readers of one tensor differ, there is a slot a scheme.
            slots.setdefault((group, scheme), Slot(name if group in named else group, "input"))
            named.add(group)
        return {name: slots[self.input_group[name], self.schemes[name]["input"]] for name in self.linears}

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back: the different schemes, and for each linear which of them are its."""
        different = list(dict.fromkeys(scheme for of_roles in self.schemes.values() for scheme in of_roles.values()))
        return {
            "schemes": [asdict(scheme, dict_factory=_unless_symmetric) for scheme in different],
            "linears": {
                name: {role: different.index(scheme) for role, scheme in of_roles.items()}
                for name, of_roles in self.schemes.items()
            },
            "input_group": dict(self.input_group),
            "saves_codes": self.saves_codes,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantPlan:
        """The plan that `to_dict` described.

        Raises:
            ValueError: it describes none; says which key is wrong.
        """
        found = TypeAdapter(_Described).validate_python(data)
        schemes, linears = found["schemes"], found["linears"]
        if any(not 0 <= index < len(schemes) for of_roles in linears.values() for index in of_roles.values()):
            raise ValueError(f"linears: must give each role the number of a scheme, 0 to {len(schemes) - 1}")
        named = {name: {role: schemes[i] for role, i in of_roles.items()} for name, of_roles in linears.items()}
        plan = cls(named, found["input_group"], found["saves_codes"])
        if problem := plan._inconsistency():
            raise ValueError(problem)
        return plan

    def _inconsistency(self) -> str | None:
        if not self.schemes:
            return "linears: must name one or more"
        if set(self.input_group) != set(self.schemes):
            return "input_group: must name a group for each of the linears"
        for name, of_roles in self.schemes.items():
            if not {"weight", "input"} <= set(of_roles):
                return f"linears.{name}: must have schemes of weight and input"
            for role, scheme in of_roles.items():
                if problem := _scheme_problem(role, scheme):
                    return f"linears.{name}.{role}: {problem}"
        return None


def _unless_symmetric(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A scheme as it was before there was the key; old trunks are known by that."""
    return {key: value for key, value in items if (key, value) != ("symmetric", True)}


def _scheme_problem(role: Role, scheme: Scheme) -> str | None:
    if scheme.format not in FORMATS or scheme.scaling.algorithm not in RULES:
        return f"format {scheme.format!r}, scaled by {scheme.scaling.algorithm!r}"
    if scheme.granularity not in GRANULARITIES or role not in GRANULARITIES[scheme.granularity].roles:
        return f"granularity: no {role} has a scale {scheme.granularity}"
    if problem := scheme.asymmetry_problem(role):
        return f"symmetric: {problem}"
    if problem := scheme.block_problem():
        return f"granularity: {problem}"
    if scheme.symmetric and not 0 < scheme.target_amax <= FORMATS[scheme.format].max_finite:
        return f"target_amax: {scheme.target_amax:g} is no value of {scheme.format}"
    return None


def make_plan(model: nn.Module, wanted: Wanted, seen: Survey | None = None) -> QuantPlan:
    """The plan that assignments, such as those of a `QatConfig`, mean for this model; linears that cannot be quantized are
    left out.

    Args:
        seen: the model's survey, where it was made already.
    Raises:
        InputError: a pattern that matches no linear, or nothing left to quantize.
    """
    experts = named_experts(model)
    seen = survey(model) if seen is None else seen
    problems: list[Problem] = []
    if seen.complaint is not None:
        problems.append(Problem(f"the model does not run on text alone: {seen.complaint}", key="model.path"))
    decided = _decisions(wanted, model, seen, problems)
    named = {name: experts[name].linears if name in experts else [name] for name in _names(model)}
    chosen = {
        linear: given
        for name, those in named.items()
        if name in decided and (given := decided[name].schemes) is not None
        for linear in those
    }
    schemes = {name: given for name, given in chosen.items() if name not in seen.unfit}
    problems += _block_problems(schemes, model)
    if not problems and not schemes:
        unfit = {name: seen.unfit[name] for name in chosen}
        cannot = f"; cannot be quantized: {described(unfit)}" if unfit else ""
        problems.append(Problem(f"nothing is left to quantize after ignore and skip_blocks{cannot}", key="qat.targets"))
    if problems:
        raise InputError(problems)
    of_experts = {linear: each.linears[0] for each in experts.values() for linear in each.linears}
    groups = {name: of_experts.get(name) or seen.first_reader[name] for name in schemes}
    return QuantPlan(schemes, groups, wanted.saves_codes)


def _block_problems(schemes: Mapping[str, Schemes], model: nn.Module) -> Iterator[Problem]:
    """Linears whose inputs are no whole number of blocks."""
    linears, experts = named_linears(model), experts_of_linears(model)
    for name, of_roles in schemes.items():
        shape = experts[name].shape if name in experts else effective_shape(linears[name])
        blocks = {scheme.block for scheme in of_roles.values() if scheme.block is not None}
        if odd := [block for block in blocks if shape[1] % block]:
            message = f"{name} takes {shape[1]} values, which are no whole number of blocks of {odd[0]}"
            yield Problem(f"{message}: leave it out, or give it another granularity in qat.modules", key="qat.ignore")
            return


def idle_assignments(model: nn.Module, wanted: Wanted, seen: Survey) -> list[Assignment]:
    """Those with patterns that decide nothing, since what they name is named before them."""
    decided = {assignment.key for assignment in _decisions(wanted, model, seen, []).values()}
    return [each for each in wanted.assignments if each.patterns and each.key not in decided]


def _names(model: nn.Module) -> list[str]:
    """What patterns are held against, in the model's order: linears, and parameters that hold experts."""
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}
    owners = {name: name for name in named_linears(model)} | {name: e.owner for name, e in named_experts(model).items()}
    return sorted(owners, key=lambda name: place[owners[name]])


def _decisions(wanted: Wanted, model: nn.Module, seen: Survey, problems: list[Problem]) -> dict[str, Assignment]:
    """Linear, or parameter that holds experts -> the first assignment that names it."""
    decided: dict[str, Assignment] = {}
    names = _names(model)
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    for assignment in reversed(wanted.assignments):  # so that the first has the last word
        decided |= dict.fromkeys(_named(assignment, names, embeddings, seen, problems), assignment)
    return decided


def _named(
    assignment: Assignment, linears: Sequence[str], embeddings: Sequence[str], seen: Survey, problems: list[Problem]
) -> set[str]:
    """The linears that an assignment names."""
    if assignment.edge_blocks is not None:
        return _edge_blocks(linears, *assignment.edge_blocks)
    if assignment.patterns is None:
        return {name for name in linears if name != seen.head and name not in seen.tied}
    matched: set[str] = set()
    for pattern in assignment.patterns:
        try:
            hits = matching_names(pattern, linears)
        except ValueError as error:
            problems.append(Problem(str(error), key=assignment.key))
            continue
        if not hits and matching_names(pattern, embeddings):
            message = (
                f"pattern '{pattern}' matches no linear: embeddings are looked up, not multiplied, and stay in BF16"
            )
            problems.append(Problem(message, key=assignment.key))
        elif not hits:
            nearest = suggestion(pattern, linears, f"names look like '{next(iter(linears), 'none')}'", cutoff=0.5)
            problems.append(Problem(f"pattern '{pattern}' matches no linear{nearest}", key=assignment.key))
        matched |= hits
    return matched


def _edge_blocks(linears: Sequence[str], first: int, last: int) -> set[str]:
    """Names of the linears in the first and last transformer blocks. A block's index is the first number in a name."""
    block = {name: int(m.group(1)) for name in linears if (m := re.search(r"\.(\d+)\.", name))}
    num_blocks = max(block.values(), default=-1) + 1
    return {name for name, index in block.items() if index < first or index >= num_blocks - last}
