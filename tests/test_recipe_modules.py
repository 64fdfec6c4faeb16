"""`qat.modules`: schemes per linear in a recipe, what each inherits, and the mistakes that can be made in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import tiny_llama
from faulty_recipe import RECIPE, lines_of

from qatrun.errors import InputError
from qatrun.quant import coverage, make_plan
from qatrun.quant.linears import survey
from qatrun.quant.plan import idle_assignments
from qatrun.recipe import QatConfig, load_recipe, parse_recipe
from qatrun.study.checking import preflight
from qatrun.study.dryrun import dry_run_of

# Each case: the lines put in place of lines of RECIPE (old -> new), and every line of the error.
MISTAKES: dict[str, tuple[str, str, list[str]]] = {
    "a module without a match": ("  format: hif8", "  modules: [{format: int8}]", [
        "r.yaml:7: qat.modules[0].match -- required, but missing",
    ]),
    "a module that matches nothing at all": ("  format: hif8", "  modules: [{match: []}]", [
        "r.yaml:7: qat.modules[0].match -- must not be empty",
    ]),
    "a module alone, without its list": ("  format: hif8", "  modules: {match: lm_head}", [
        "r.yaml:7: qat.modules -- must be a list (got a mapping)",
    ]),
    "a pattern for a module": ("  format: hif8", "  modules: [lm_head]", [
        "r.yaml:7: qat.modules[0] -- must be a mapping (got 'lm_head')",
    ]),
    "a module's expression that does not compile": ("  format: hif8", "  modules:\n  - match: 're:mlp.('", [
        "r.yaml:8: qat.modules[0].match[0] -- invalid regular expression 're:mlp.(': missing ) at position 5",
    ]),
    "unknown format of a module": ("  format: hif8", "  modules:\n  - match: lm_head\n    format: hif9", [
        "r.yaml:9: qat.modules[0].format -- unknown format 'hif9' (did you mean 'hif8'?)",
    ]),
    "unknown key of a module": ("  format: hif8", "  modules:\n  - match: lm_head\n  - {match: x, inputs: {}}", [
        "r.yaml:9: qat.modules[1].inputs -- unknown key (did you mean 'input'?)",
    ]),
    "unknown choice in a module's role": ("  format: hif8", "  modules:\n  - match: x\n    input: {granularity: per_tokn}", [
        "r.yaml:9: qat.modules[0].input.granularity -- unknown granularity 'per_tokn' (did you mean 'per_token'?)",
    ]),
    "a module's granularity": ("  format: hif8", "  modules: [{match: x, input: {granularity: per_channel}}]", [
        "r.yaml:7: qat.modules[0].input.granularity -- per_channel makes no sense for input (did you mean 'per_token'?)",
    ]),
    "a module in BF16, and how": ("  format: hif8", "  modules:\n  - match: x\n    format: null\n    weight: {}", [
        "r.yaml:10: qat.modules[0].weight -- makes no sense for linears left in BF16 (format: null); leave weight out",
    ]),
    "an asymmetric input that a module inherits": (
        "  format: hif8", "  format: int8\n  input: {symmetric: false}\n  modules:\n  - match: x\n    format: hif8", [
        "r.yaml:11: qat.modules[0].format -- hif8 is finest about zero, so a zero-point makes no sense: "
        "only int8 inputs have one",
    ]),
    "a module with a unit of its own": ("  format: hif8", "  modules:\n  - match: x\n    scaling: {unit: microbatch}", [
        "r.yaml:9: qat.modules[0].scaling.unit -- one unit for all roles: set qat.scaling.unit (here optimizer_step)",
    ]),
    "INT8 gradients of a module": ("  format: hif8", "  grad_output: {}\n  modules:\n  - {match: x, format: int8}", [
        "r.yaml:9: qat.modules[0].format -- int8 makes no sense for grad_output: its range is too narrow "
        "(did you mean 'fp8_e5m2'?)",
    ]),
    "a module of one arm": ("  hif8: {}", "  hif8:\n    qat:\n      modules:\n      - {match: x, fromat: int8}", [
        "r.yaml:13: arms.hif8.qat.modules[0].fromat -- unknown key (did you mean 'format'?)",
    ]),
    "a module's target, an arm's format": ("  format: hif8\narms:",
                                           "  modules: [{match: x, input: {target_amax: 200}}]\narms:\n  i: "
                                           "{qat: {format: int8}}", [
        "r.yaml:9: arms.i.qat.format -- target_amax 200 is above the largest int8 value (at most 127)",
    ]),
}  # fmt: skip


def config(*modules: dict[str, Any], **qat: Any) -> QatConfig:
    return QatConfig.model_validate({**qat, "modules": list(modules)})


def own(*modules: dict[str, Any], **qat: Any) -> Any:
    """Schemes of the linears of the last of these modules."""
    made = config(*modules, **qat)
    return made.schemes_of(made.modules[-1])


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_in_a_module(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, new, expected = MISTAKES[case]
    assert RECIPE.count(old) == 1
    assert lines_of(RECIPE.replace(old, new)) == expected


# --- what is inherited


def test_what_a_module_does_not_say_is_as_qat_has_it() -> None:
    qat: dict[str, Any] = {
        "format": "fp8_e4m3",
        "scaling": {"window": 7, "rounding": "power_of_two"},
        "weight": {"granularity": "per_channel"},
        "input": {"target_amax": 100.0, "scaling": {"algorithm": "most_recent"}},
        "grad_output": {"format": "fp8_e5m2"},
        "clip": "target",
    }
    assert own({"match": "x"}, **qat) == QatConfig.model_validate(qat).schemes
    schemes = own({"match": "x", "input": {"scaling": {"window": 3}}, "weight": {"target_amax": 9.0}}, **qat)
    assert (schemes["weight"].granularity, schemes["weight"].target_amax) == ("per_channel", 9.0)
    scaling = schemes["input"].scaling
    assert (scaling.window, scaling.algorithm, scaling.rounding) == (3, "most_recent", "power_of_two")
    assert schemes["input"].target_amax == 100.0
    assert {scheme.clip for scheme in schemes.values()} == {"target"}


def test_a_target_is_of_its_format() -> None:
    """15 of INT8's 127 steps would be a mistake that nobody sees."""
    hif8: dict[str, Any] = {"format": "hif8", "input": {"target_amax": 15.0}}
    assert own({"match": "x", "format": "int8"}, **hif8)["input"].target_amax == 127
    assert own({"match": "x", "format": "int8", "input": {"target_amax": 64.0}}, **hif8)["input"].target_amax == 64
    assert own({"match": "x"}, **hif8)["input"].target_amax == 15


def test_a_type_of_scaling_is_of_its_granularity() -> None:
    static: dict[str, Any] = {"input": {"scaling": {"type": "static", "window": 5}}}
    scheme = own({"match": "x", "input": {"granularity": "per_token"}}, **static)["input"]
    assert (scheme.granularity, scheme.scaling.type, scheme.scaling.window) == ("per_token", "dynamic", 5)
    per_token: dict[str, Any] = {"input": {"granularity": "per_token"}}
    assert own({"match": "x", "input": {"granularity": "per_tensor"}}, **per_token)["input"].scaling.type == "delayed"


def test_null_leaves_linears_or_gradients_as_they_are() -> None:
    assert own({"match": "x", "format": None}) is None
    assert set(own({"match": "x", "grad_output": None}, grad_output={})) == {"weight", "input"}
    assert set(own({"match": "x", "grad_output": {}})) == {"weight", "input", "grad_output"}
    assert own({"match": "x", "format": "int8", "grad_output": {"format": "hif8"}})["grad_output"].format == "hif8"


# --- how a recipe keeps and lays it


def recipe_of(**sections: Any) -> Any:
    demo = {"model": {"path": "builtin:demo"}, "data": {"train": {"path": "builtin:demo", "split": "finetune"}}}
    rest = {"name": "study", "train": {"steps": 600}, "eval": {"tasks": {"demo_facts": 0}}}
    return parse_recipe({**demo, **rest, **sections})


def test_a_recipe_keeps_what_an_entry_says_and_nothing_where_there_is_none(tmp_path: Path) -> None:
    modules = [{"match": ["a", "re:b"], "format": None}, {"match": "c", "input": {"granularity": "per_token"}}]
    recipe = recipe_of(qat={"modules": modules})
    (tmp_path / "kept.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(tmp_path / "kept.yaml")
    assert again.arm_by_name["hif8"].qat.assignments == recipe.arm_by_name["hif8"].qat.assignments
    kept = recipe.qat.model_dump(mode="json")["modules"]
    assert kept == [modules[0], {"match": ["c"], "input": {"granularity": "per_token"}}]
    assert "modules" not in json.dumps(recipe_of().model_dump(mode="json"))  # studies made before there was the key


def test_a_list_replaces_that_of_the_parent_and_arms_have_their_own(tmp_path: Path) -> None:
    mixed = "  hif8: {}\n  mixed: {qat: {modules: [{match: x, format: null}]}}"
    base = RECIPE.replace("  hif8: {}", mixed).replace("  format: hif8", "  format: hif8\n  modules: [{match: y}]")
    (tmp_path / "base.yaml").write_text(base, encoding="utf-8")
    (tmp_path / "r.yaml").write_text("extends: base.yaml\nqat:\n  modules:\n  - match: z\n  - match: v\n")
    found = {
        name: [module.match for module in arm.qat.modules]
        for name, arm in load_recipe(tmp_path / "r.yaml").arm_by_name.items()
        if arm.qat is not None
    }
    assert found == {"hif8": [("z",), ("v",)], "mixed": [("x",)]}
    set_to = load_recipe(tmp_path / "r.yaml", ["qat.modules=[{match: w}]"]).arm_by_name["hif8"]
    assert set_to.qat is not None
    assert [module.match for module in set_to.qat.modules] == [("w",)]


# --- what it means for a model


def test_the_first_entry_that_matches_decides_after_ignore_and_before_targets() -> None:
    wanted = config(
        {"match": "*.down_proj", "format": "int8"},
        {"match": "model.layers.0.mlp.*", "format": None},
        {"match": ["lm_head", "*.up_proj"], "format": "fp8_e4m3"},
        ignore=["model.layers.1.mlp.down_proj"],
        targets=["*.mlp.*"],
    )
    model = tiny_llama()
    plan = make_plan(model, wanted)
    assert {name: schemes["input"].format for name, schemes in plan.schemes.items()} == {
        "model.layers.0.mlp.down_proj": "int8",
        "model.layers.1.mlp.gate_proj": "hif8",
        "model.layers.1.mlp.up_proj": "fp8_e4m3",
        "lm_head": "fp8_e4m3",
    }
    assert [(s.schemes["weight"].format, s.linears) for s in coverage(model, plan).shares] == [
        ("int8", ("model.layers.0.mlp.down_proj",)),
        ("hif8", ("model.layers.1.mlp.gate_proj",)),
        ("fp8_e4m3", ("model.layers.1.mlp.up_proj", "lm_head")),
    ]


def test_an_entry_that_matches_nothing_is_a_mistake_that_names_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        make_plan(tiny_llama(), config({"match": "*.down_proj"}, {"match": ["*.up_proj", "model.layers.0.mlp.upproj"]}))
    (problem,) = caught.value.problems
    assert problem.key == "qat.modules[1].match"
    assert "matches no linear (did you mean 'model.layers.0.mlp.up_proj'?)" in problem.message


def test_an_entry_that_comes_too_late_is_named() -> None:
    model = tiny_llama()
    wanted = config({"match": "*.mlp.*"}, {"match": "*.down_proj", "format": "int8"}, {"match": "*.q_proj"})
    assert [idle.key for idle in idle_assignments(model, wanted, survey(model))] == ["qat.modules[1].match"]


def test_a_check_shows_schemes_by_coverage_and_what_engines_will_refuse() -> None:
    modules: list[Any] = [{"match": "*.down_proj", "format": "int8", "input": {"granularity": "per_token"}}]
    checked = dry_run_of(preflight(recipe_of(qat={"format": "fp8_e4m3", "modules": modules})))
    (roles,) = (arm.roles for arm in checked.arms if arm.roles)
    assert [line.partition(",")[0] for line in roles] == [
        "24 linears",
        "  weight fp8_e4m3 per_tensor",
        "  input fp8_e4m3 per_tensor",
        "4 linears",
        "  weight int8 per_tensor",
        "  input int8 per_token",
    ]
    assert roles[3].endswith("of linear FLOPs: model.layers.*.mlp.down_proj")
    (covered,) = (arm.coverage for arm in checked.arms if arm.coverage)
    assert "quantized (fp8_e4m3 " in covered
    assert not checked.warnings

    modules = [{"match": "*.mlp.up_proj", "format": None}, {"match": "*.layers.0.*.up_proj", "format": "hif8"}]
    checked = dry_run_of(preflight(recipe_of(arms={"bf16": {"qat": None}, "mixed": {"qat": {"modules": modules}}})))
    assert [warning.partition(" -- ")[0] for warning in checked.warnings] == [
        "arms.mixed.qat.modules[1].match",
        "arms.mixed.qat",
    ]
    assert "vLLM merges model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj into one matrix" in checked.warnings[1]
