"""A recipe's quantized arms without any training: what `qatrun ptq` runs."""

from __future__ import annotations

from qatrun.errors import InputError, Problem
from qatrun.recipe.loader import parse_recipe
from qatrun.recipe.schema import START, Arm, Recipe

SUFFIX = "-ptq"


def calibrated_alone(recipe: Recipe) -> Recipe:
    """The recipe of another study: every quantized arm, made from the start model by calibration. Of arms that differ in
    training alone the first is left.

    Raises:
        InputError: no arm is quantized.
    """
    arms = {name: arm for name, arm in recipe.arm_by_name.items() if arm.qat is not None}
    if not arms:
        raise InputError(Problem("no arm is quantized, so there is nothing to calibrate", "arms"))
    different: dict[str, str] = {}
    for name, arm in arms.items():
        different.setdefault(_made_by(arm), name)
    kept = set(different.values())
    return parse_recipe(
        recipe.model_dump(mode="json")
        | {
            "name": recipe.name + SUFFIX,
            "arms": {name: {**recipe.arms[name], "method": "ptq", "twin": START} for name in arms if name in kept},
            "train": recipe.train.model_dump(mode="json") | {"seeds": None},
            "contrasts": {ask: pair for ask, pair in recipe.contrasts.items() if {*pair} <= kept | {START}},
        }
    )


def _made_by(arm: Arm) -> str:
    """All that calibration depends on."""
    assert arm.qat is not None
    schemes = {
        role: [scheme.format, scheme.granularity, scheme.target_amax, scheme.clip, scheme.symmetric, unscaled]
        for role, scheme in arm.qat.schemes.items()
        if role != "grad_output"
        for unscaled in [(scheme.scaling.type == "none" and not scheme.per_row, scheme.scaling.rounding)]
    }
    chosen = arm.qat.model_dump(mode="json", include={"targets", "ignore", "skip_blocks", "modules"})
    return repr([schemes, chosen, arm.qat.calibrating, arm.model, arm.data, arm.export])
