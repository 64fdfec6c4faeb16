"""How an arm is quantized, in words, and what engines and chips will make of it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from qatrun import hardware
from qatrun.errors import Problem
from qatrun.export import EXPORTS
from qatrun.export.linears import merged_problems
from qatrun.formats import Role
from qatrun.layout import START
from qatrun.quant import (
    Coverage,
    QuantPlan,
    Survey,
    find_folds,
    folded,
    idle_assignments,
    kinds,
    named_linears,
)
from qatrun.quant.linears import described
from qatrun.recipe import Arm, QatConfig
from qatrun.scheme import Scheme


def schemes_text(qat: QatConfig, covered: Coverage | None) -> list[str]:
    """How tensors are quantized, a line a role; where linears differ, by what they have in common."""
    shares = covered.shares if covered is not None else ()
    if covered is None or len(shares) < 2:
        schemes = shares[0].schemes if shares else qat.schemes
        return [_role_text(*each) for each in schemes.items()]
    lines: list[str] = []
    for share in shares:
        part = share.weights / covered.linear_weights
        lines.append(f"{len(share.linears)} linears, {part:.0%} of {covered.measure}: {kinds(share.linears)}")
        lines += [f"  {_role_text(*each)}" for each in share.schemes.items()]
    return lines


def _role_text(role: Role, scheme: Scheme) -> str:
    scaling = scheme.scaling
    how = f"{scaling.type} {scaling.algorithm} over {scaling.window}" if scaling.type == "delayed" else scaling.type
    if scaling.to_power_of_two:
        how += ", powers of two"
    onto = (
        f"amax to {scheme.target_amax:g}" if scheme.symmetric else f"range to {scheme.target_amax:g} steps (asymmetric)"
    )
    return f"{role} {scheme.format} {scheme.granularity}, {onto}, {how}"


def calibration_lines(arm: Arm, plan: QuantPlan, model: nn.Module) -> Iterator[str]:
    """How the scales of an arm are found without training; nothing where they are not."""
    if arm.qat is None or (arm.trains and arm.qat.init != "ptq"):
        return
    how = arm.qat.calibrating
    what = "the start model" if arm.twin == START or arm.trains else arm.twin
    by = "the largest value" if how.input == "absmax" else "the least mean square error of inputs"
    yield f"calibration of {what}: {how.sequences} sequences of {arm.data.seq_len} tokens, scales by {by}"
    if how.smooth is None:
        return
    smoothed = {name for fold in folded(find_folds(model), plan.schemes) for name in fold.readers}
    left = {name: "what makes their input cannot be scaled" for name in plan.linears if name not in smoothed}
    text = f"inputs of {len(plan.linears) - len(left)} of {len(plan.linears)} linears smoothed by {how.smooth:g}"
    yield text + (f"; not: {described(left)}" if left else "")


def export_problems(arm: Arm, plan: QuantPlan, model: nn.Module) -> Iterator[Problem]:
    """What a format that an arm is to be exported as cannot say of it."""
    for name in arm.export:
        for problem in EXPORTS[name].problems(plan, model):
            yield Problem(f"arm '{arm.name}' as {name}: {problem}", "export")


def scheme_warnings(arm: Arm, plan: QuantPlan, model: nn.Module, seen: Survey) -> Iterator[Problem]:
    """Entries that decide nothing, and what an engine will refuse where no `export` makes a problem of it already."""
    assert arm.qat is not None
    for idle in idle_assignments(model, arm.qat, seen):
        yield Problem("decides nothing: all that it matches is decided before it (the first match wins)", idle.key)
    refused = [] if arm.export else list(merged_problems(plan, named_linears(model)))
    if refused:
        more = f"; {len(refused)} such groups" if len(refused) > 1 else ""
        yield Problem(f"arm '{arm.name}' cannot be served as it is: {refused[0]}{more}", "qat")


def on_hardware(arm: Arm, covered: Coverage, chip: str) -> tuple[list[str], list[Problem]]:
    """What of an arm the chip runs natively, a line a scheme, and a warning for each that it does not."""
    alike: dict[tuple[Scheme, Scheme], list[str]] = {}
    for share in covered.shares:
        alike.setdefault((share.schemes["weight"], share.schemes["input"]), []).extend(share.linears)
    pairs = {f"{kinds(names)}: " if len(alike) > 1 else "": schemes for schemes, names in alike.items()}
    found = list(hardware.lines(chip, pairs))
    native = [line for answer, line in found if answer.is_native]
    return native, [
        Problem(f"arm '{arm.name}' {line}", "target.hardware") for answer, line in found if not answer.is_native
    ]
