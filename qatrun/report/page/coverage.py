"""Which linears are quantized, and how."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from qatrun.formats import ROLES, Role
from qatrun.quant import QuantPlan
from qatrun.report.page.content import ArmContent
from qatrun.report.page.document import Section
from qatrun.report.page.table import Table, printable, table
from qatrun.report.page.tensors import block
from qatrun.scheme import Scaling, Scheme

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def coverage_section(arms: Iterable[ArmContent]) -> Section:
    """Share of the linears and FLOPs that each arm quantizes, the linears by kind, the formats by role."""
    quantized = [arm for arm in arms if arm.plan is not None or arm.coverage]
    if not quantized:
        return Section("coverage", "Coverage", notes=("No arm quantizes anything.",))
    facts = tuple((arm.name, printable(arm.coverage)) for arm in quantized if arm.coverage)
    planned = [(arm, arm.plan) for arm in quantized if arm.plan is not None]
    tables = (_linears_table(planned), _roles_table(planned)) if planned else ()
    notes = () if planned else ("Which linears they are was not recorded (plan.json).",)
    return Section("coverage", "Coverage", tables=tables, notes=notes, facts=facts)


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as runs: `0–3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def _linears_table(planned: Sequence[tuple[ArmContent, QuantPlan]]) -> Table:
    """A row a kind of linear, set of blocks and, in an arm that has several, scheme; arms that share it stand in one row."""
    arms_of: dict[tuple[str, int, str, str | None], list[str]] = {}
    for arm, plan in planned:
        alike: dict[tuple[str, str | None], list[str]] = {}
        texts = {name: _schemes(schemes) for name, schemes in plan.schemes.items()}
        is_mixed = len(set(texts.values())) > 1
        for name, text in texts.items():
            alike.setdefault((_NUMBER.sub("*", name, count=1), text if is_mixed else None), []).append(name)
        for (kind, where_mixed), names in alike.items():
            blocks = [number for name in names if (number := block(name)) is not None]
            arms_of.setdefault((kind, len(names), ranges(blocks), where_mixed), []).append(arm.name)
    rows = [(*row, ", ".join(arms)) for row, arms in arms_of.items()]
    return table(
        ("quantized linears", "number", "blocks", "scheme, where they differ", "arms"), rows, "Linears", "coverage"
    )


def _schemes(schemes: Mapping[Role, Scheme]) -> str:
    """`weight int8 per_channel, input int8 per_token`."""
    return ", ".join(f"{role} {scheme.format} {scheme.granularity}" for role, scheme in schemes.items())


def _roles_table(planned: Sequence[tuple[ArmContent, QuantPlan]]) -> Table:
    """A row an arm, a role and a scheme that any of its tensors has."""
    rows = {
        (
            arm.name,
            role,
            scheme.format,
            scheme.granularity if scheme.symmetric else f"{scheme.granularity}, asymmetric",
            scheme.target_amax,
            _scaling(scheme.scaling),
            scheme.clip,
        ): None
        for arm, plan in planned
        for role in ROLES
        for schemes in plan.schemes.values()
        if (scheme := schemes.get(role)) is not None
    }
    columns = ("arm", "role", "format", "granularity", "target amax", "scaling", "clipped at")
    return table(columns, list(rows), "Formats by role")


def _scaling(scaling: Scaling) -> str:
    if scaling.type != "delayed":
        return scaling.type
    return f"delayed, {scaling.algorithm} of {scaling.window}, every {scaling.update_interval}"
