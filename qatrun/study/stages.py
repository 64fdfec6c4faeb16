"""What a study of one seed will do, in order, as the display announces it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qatrun.recipe import Arm, Recipe
from qatrun.report.stages import Stage
from qatrun.study.known_text import KNOWN_TEXT
from qatrun.study.segments import ArmSegments


def planned_stages(recipe: Recipe, arms: Mapping[str, Arm], segments: Sequence[ArmSegments]) -> list[Stage]:
    """Every stage; a resume passes over those that are done. Scoring counts models on all items."""
    return list(_stages(recipe, arms, segments))


def _stages(recipe: Recipe, arms: Mapping[str, Arm], segments: Sequence[ArmSegments]) -> Iterator[Stage]:
    yield Stage("reading", KNOWN_TEXT, 1)
    yield Stage("scoring", "start model", 1)
    trunks = set()
    for each in segments:
        arm, first = each.own.arm, 0
        if each.trunk is not None:
            first = each.trunk.last_step
            if each.trunk.folder not in trunks:
                trunks.add(each.trunk.folder)
                yield Stage("training", each.trunk.name, each.trunk.last_step)
        yield Stage("training", each.own.name, each.own.last_step - first)
        states = ("",) if arm.qat is None else (", quantizers on", ", quantizers off")
        for state in states:
            yield Stage("scoring", f"{arm.name}{state}", 1)
    for name, arm in arms.items():
        if not arm.trains:
            yield Stage("scoring", f"{name}, quantizers on", 1)
    if recipe.diagnose.at_end:
        for name, arm in arms.items():
            if arm.twin is not None and arm.trains:
                yield Stage("scoring", f"{arm.twin} quantized after training", 1)
                yield Stage("scoring", f"{name} with fresh scales", 1)
