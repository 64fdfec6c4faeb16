"""What serving engines that merge linears ask of a plan: vLLM and its kin make one matrix of q/k/v, and one of gate/up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from qatrun.formats import FORMATS
from qatrun.quant import QuantPlan, experts_of_linears, named_linears
from qatrun.scheme import Scheme

MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def merged_groups(linears: Iterable[str]) -> list[list[str]]:
    """Those of these linears that engines merge, each group in order."""
    names = dict.fromkeys(linears)
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    groups = ([f"{parent}.{leaf}" for leaf in leaves] for parent in parents for leaves in MERGED)
    return [group for group in groups if all(name in names for name in group)]


def forward_schemes(plan: QuantPlan, name: str) -> tuple[Scheme, Scheme]:
    """Of a linear's weight and input."""
    return plan.schemes[name]["weight"], plan.schemes[name]["input"]


def input_schemes(plan: QuantPlan) -> list[Scheme]:
    """The different ones."""
    return list(dict.fromkeys(plan.schemes[name]["input"] for name in plan.linears))


def linear_problems(export: str, plan: QuantPlan, model: nn.Module) -> Iterator[str]:
    """Linears that are none, heads, and groups to be merged whose schemes differ.

    Args:
        export: by its name.
        model: with its linears as they were.
    """
    linears = named_linears(model)
    if odd := [name for name in plan.linears if name in linears and not isinstance(linears[name], nn.Linear)]:
        kind = type(linears[odd[0]]).__name__
        yield f"{odd[0]} is a {kind}, and {export} knows nn.Linear alone ({len(odd)} such); leave it in BF16 (qat.ignore)"
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if names := [name for name in plan.linears if linears.get(name, model) is head]:
        yield f"{names[0]} is the output head, which engines keep in BF16; leave it out (qat.ignore)"
    yield from merged_problems(plan, linears)


def merged_problems(plan: QuantPlan, linears: Iterable[str]) -> Iterator[str]:
    """Groups to be merged whose schemes differ; `linears` are all of the model."""
    for group in merged_groups(linears):
        if len({_merged_scheme(plan, name) for name in group}) > 1:
            shown = "; ".join(f"{name}: {_said(plan, name)}" for name in group)
            yield f"vLLM merges {', '.join(group)} into one matrix, which needs one scheme for all ({shown})"


def expert_problems(export: str, plan: QuantPlan, model: nn.Module) -> Iterator[str]:
    """Experts that are held in one parameter, whose layout differs from engine to engine."""
    experts = experts_of_linears(model)
    if names := [name for name in plan.linears if name in experts]:
        parameter = names[0].rpartition(".")[0]
        yield (
            f"{parameter} holds experts in one tensor, which is not written as {export} yet; `quantized/` holds them, "
            f"qatrun.load opens it (or leave them in BF16: qat.ignore)"
        )


def input_problems(scheme: Scheme) -> Iterator[str]:
    """How inputs are quantized that engines cannot do."""
    largest = FORMATS[scheme.format].max_finite
    if not scheme.symmetric:
        if scheme.per_row:
            yield "asymmetric token scales are not written (qat.input.symmetric: true, or per_tensor)"
        return
    if scheme.limit is not None and scheme.limit < largest:
        yield (
            f"inputs are clipped at {scheme.limit:g} of {scheme.format}, and engines clip at {largest:g} alone (qat.clip: "
            "format)"
        )
    elif scheme.per_row and scheme.target_amax != largest:
        yield f"engines map a token's amax to {largest:g}, not to {scheme.target_amax:g} (qat.input.target_amax: null)"
    if scheme.per_row and scheme.scaling.to_power_of_two:
        yield "engines round no token scale to a power of two (qat.input.scaling.rounding: none)"


def _merged_scheme(plan: QuantPlan, name: str) -> tuple[str, Scheme] | None:
    """What linears that are merged must agree on: how a weight's scale is shared they need not."""
    if name not in plan.schemes:
        return None
    weight, of_input = forward_schemes(plan, name)
    return weight.format, of_input


def _said(plan: QuantPlan, name: str) -> str:
    if name not in plan.schemes:
        return "BF16"
    weight, of_input = forward_schemes(plan, name)
    return f"{weight.format}, inputs {of_input.format} {of_input.granularity}"
