"""Remedies: what a diagnosis advises, as settings of another arm; and that arm, tried."""

from __future__ import annotations

from typing import Any

import pytest

from qatrun.quant import QuantPlan
from qatrun.recipe import Arm, parse_recipe
from qatrun.records.diagnosis import TensorRecord
from qatrun.study.fix import _with_arm
from qatrun.study.remedies import Remedy, remedies

RECIPE = {
    "name": "study",
    "model": {"path": "builtin:demo"},
    "data": {"train": {"path": "builtin:demo", "split": "finetune"}},
    "train": {"steps": 100, "learning_rate": 1e-3, "lr_warmup_steps": 10},
    "warmup": {"steps": 20},
    "eval": {"tasks": {"demo_facts": 0}},
}


def arm_of(**qat: Any) -> Arm:
    return parse_recipe({**RECIPE, "arms": {"bf16": {"qat": None}, "arm": {"qat": qat}}}).arm_by_name["arm"]


def tensor(linear: str, sqnr_db: float | None) -> TensorRecord:
    return TensorRecord(
        tensor=f"{linear}:input", clip_fraction=0.0, overshoot=1.0, sqnr_db=sqnr_db, since_step=None, scale=1.0
    )


def plan_of(*linears: str) -> QuantPlan:
    schemes = arm_of().qat.schemes  # type: ignore[union-attr]
    return QuantPlan(dict.fromkeys(linears, schemes), {linear: linear for linear in linears})


LAGGING = {"algorithm": "most_recent", "window": 1, "update_interval": 10}


@pytest.mark.parametrize(
    ("cause", "qat", "texts"),
    [
        ("forgetting", {}, ["learning_rate 0.0001", "learning_rate 1e-05"]),
        ("saturation", {"scaling": LAGGING}, ["delayed scaling by the max of 64", "dynamic scaling"]),
        ("saturation", {"clip": "target"}, ["clip: format", "dynamic scaling"]),
        ("saturation", {"format": "int8", "clip": "target"}, ["dynamic scaling"]),  # the target is the edge
        ("saturation", {"input": {"target_amax": 200.0}}, ["target_amax as", "dynamic scaling"]),
        ("saturation", {"scaling": {"type": "static"}}, ["delayed scaling by the max", "dynamic scaling"]),
        ("saturation", {"scaling": {"type": "dynamic"}}, []),
        (
            "resolution",
            {"format": "int8"},
            ["per_channel weights and per_token inputs", "format hif8", "the 1 linears"],
        ),
        ("resolution", {"input": {"granularity": "per_token"}}, ["per_channel weights", "the 1 linears"]),
        (
            "resolution",
            {"modules": [{"match": "a", "format": "int8"}]},
            ["per_channel", "format hif8", "the 1 linears"],
        ),
        ("divergence", {}, []),
        ("input", {}, []),
    ],
)
def test_what_is_tried_in_which_order(cause: str, qat: dict[str, Any], texts: list[str]) -> None:
    found = remedies(cause, arm_of(**qat), plan_of("a", "b", "c"), [tensor("a", 30.0), tensor("b", 3.0)])
    assert len(found) == len(texts)
    for remedy, text in zip(found, texts, strict=True):
        assert text in remedy.text


def test_scales_that_are_too_large_are_made_anew_each_step() -> None:
    loose = tensor("a", 9.0).model_copy(update={"typical_overshoot": 0.14})
    texts = [each.text for each in remedies("resolution", arm_of(format="int8"), plan_of("a", "b", "c"), [loose])]
    assert texts[0].startswith("per_channel weights and per_token inputs")
    assert texts[1].startswith("dynamic scaling")


@pytest.mark.parametrize("cause", ["forgetting", "saturation", "resolution"])
@pytest.mark.parametrize(
    "qat",
    [
        {"format": "int8", "clip": "target", "scaling": LAGGING},
        {"format": "fp8_e4m3", "input": {"scaling": LAGGING, "target_amax": 400.0}},
        {"scaling": LAGGING, "weight": {"granularity": "per_channel"}, "grad_output": {}},
        {"modules": [{"match": "a", "format": "int8", "input": {"scaling": LAGGING}}, {"match": "b", "format": None}]},
    ],
)
def test_every_remedy_is_a_recipe_that_changes_what_it_says(cause: str, qat: dict[str, Any]) -> None:
    recipe = parse_recipe({**RECIPE, "arms": {"bf16": {"qat": None}, "arm": {"qat": qat}}})
    arm = recipe.arm_by_name["arm"]
    for remedy in remedies(cause, arm, plan_of("a", "b", "c"), [tensor("b", 3.0)]):
        with_arm = _with_arm(recipe, arm, "arm-fix1", remedy)
        new = with_arm.arm_by_name["arm-fix1"]
        assert (new.qat, new.train) != (arm.qat, arm.train)
        assert with_arm.arm_by_name["arm"] == arm
        twin = with_arm.arm_by_name[str(new.twin)]
        assert (twin.qat, twin.train, twin.warmup) == (None, new.train, new.warmup)
        assert (new.twin == "bf16") == (not remedy.of_training)


def test_the_worst_linears_are_those_that_keep_least() -> None:
    linears = [f"layer{n}" for n in range(20)]
    found = remedies(
        "resolution", arm_of(), plan_of(*linears), [tensor(name, 40.0 - n) for n, name in enumerate(linears)]
    )
    assert found[-1].overrides == {"qat": {"ignore": ["layer19", "layer18"]}}


def test_a_remedy_reaches_the_modules_that_have_schemes_of_their_own() -> None:
    modules: list[Any] = [
        {"match": "a", "input": {"granularity": "per_token"}},
        {"match": "b", "format": "int8", "input": {"scaling": LAGGING}},
        {"match": "c", "format": None},
    ]
    recipe = parse_recipe({**RECIPE, "arms": {"bf16": {"qat": None}, "arm": {"qat": {"modules": modules}}}})
    arm = recipe.arm_by_name["arm"]
    first, *_ = remedies("saturation", arm, plan_of("a", "b"), [])
    qat = _with_arm(recipe, arm, "fixed", first).arm_by_name["fixed"].qat
    assert qat is not None
    assert [scaling.window for each in qat.all_schemes for scaling in [each["input"].scaling]] == [64] * 3
    assert [each["input"].scaling.type for each in qat.all_schemes] == ["delayed", "dynamic", "delayed"]
    assert qat.assignments[-2].schemes is None

    both = first + remedies("resolution", arm, plan_of("a", "b"), [])[0]
    again = _with_arm(recipe, arm, "fixed", both).arm_by_name["fixed"].qat
    assert again is not None
    assert {scheme.per_row for each in again.all_schemes for scheme in each.values()} == {True}


def test_remedies_of_two_causes_are_tried_together() -> None:
    first = Remedy("slower", {"train": {"learning_rate": 1.0}}, of_training=True)
    second = Remedy("wider", {"qat": {"clip": "format"}})
    both = first + second
    assert (both.text, both.of_training) == ("slower; wider", True)
    assert both.overrides == {"train": {"learning_rate": 1.0}, "qat": {"clip": "format"}}
