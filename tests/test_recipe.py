"""Recipes: what ships, how parts are merged, what is inherited; any text gives a recipe or a list of mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qatrun.errors import RecipeError
from qatrun.formats import FORMATS
from qatrun.recipe import Recipe, json_schema, load_recipe, parse_recipe, shipped_recipes, template
from qatrun.recipe.document import Document, Place, merge
from qatrun.recipe.qat import QatConfig, RoleConfig, RoleScaling, ScalingConfig
from qatrun.recipe.shipped import recipes_dir
from qatrun.scheme import GRANULARITIES, RULES, Scaling

SHIPPED = [recipe.name for recipe in shipped_recipes()]


def _recipe(**sections: Any) -> Recipe:
    minimal: dict[str, Any] = {
        "name": "study",
        "model": {"path": "m"},
        "data": {"train": {"path": "d"}},
        "train": {"steps": 1000},
        "eval": {"tasks": {"mmlu": 5}},
    }
    return parse_recipe(minimal | sections)


# --- what ships


def test_these_recipes_ship() -> None:
    expected = ["ablation-openpangu-1b", "ablation", "demo", "llama-3.2-1b-fp8", "local-model", "openpangu-1b-hif8"]
    assert [*expected, "ptq", "qad", "qwen3-0.6b-hif8", "serve-fp8", "smollm2-135m-int8"] == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads_by_name_and_path(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe == load_recipe(recipes_dir() / f"{name}.yaml")
    twins = [arm.twin for arm in recipe.arm_by_name.values()]
    assert twins == [None, "bf16"] or name.startswith(("ablation", "ptq", "qad", "serve"))


@pytest.mark.parametrize("recipe", shipped_recipes(), ids=SHIPPED)
def test_shipped_recipe_opens_with_purpose_needs_command_and_override(recipe: Any) -> None:
    header = recipe.path.read_text(encoding="utf-8").split("\nname:")[0]
    subject = "FILE" if recipe.name == "local-model" else recipe.name
    assert recipe.purpose.endswith(".")
    assert "# Needs:     " in header
    assert f"# Run:       qatrun train {subject}\n" in header
    assert f"# Override:  qatrun train {subject} --set " in header


@pytest.mark.parametrize("name", SHIPPED)
def test_override_example_in_the_header_works(name: str) -> None:
    text = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    command = re.search(r"# Override:  (.*)", text)
    assert command is not None
    overrides = [quoted.replace("'", "") for quoted in re.findall(r"--set (\S+)", command[1])]
    assert load_recipe(name, overrides) != load_recipe(name)


def test_openpangu_recipe_is_the_published_configuration() -> None:
    arm = load_recipe("openpangu-1b-hif8").arm_by_name["hif8"]
    train = arm.train
    assert (train.steps, train.global_batch_size, train.learning_rate) == (10_000, 1024, 1e-5)
    assert (train.lr_schedule, train.lr_warmup_steps, train.min_lr_ratio) == ("cosine", 300, 0.0)
    assert (train.betas, train.weight_decay, train.max_grad_norm) == ((0.9, 0.95), 0.1, 1.0)
    source = arm.data.train
    assert (source.path, source.subset, source.streaming) == ("HuggingFaceFW/fineweb", "sample-10BT", True)
    assert (arm.data.seq_len, arm.switch_step) == (1024, 500)
    assert arm.qat is not None
    scaling = Scaling(type="delayed", algorithm="max", window=64, update_interval=1, unit="microbatch")
    assert [(role, s.format, s.target_amax, s.scaling) for role, s in arm.qat.schemes.items()] == [
        ("weight", "hif8", 15.0, scaling),
        ("input", "hif8", 15.0, scaling),
        ("grad_output", "hif8", 224.0, scaling),
    ]
    assert (arm.qat.skip_blocks.first, arm.qat.skip_blocks.last) == (3, 2)
    assert arm.qat.targets is not None
    pattern = re.compile(arm.qat.targets[0].removeprefix("re:"))
    assert pattern.fullmatch("model.layers.3.mlp.gate_proj")
    assert not pattern.fullmatch("model.layers.3.self_attn.q_proj")
    assert arm.eval.tasks == {"mmlu": 5, "hellaswag": 10, "arc_challenge": 25}


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "/data/my model/", 'C:\\new "one"', "../..", "模型"])
def test_template_is_a_recipe_for_the_model(model: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(template(model), encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.model.path == model
    assert recipe.name.endswith("-hif8")
    mine, its = (one.model_dump(exclude={"model", "name"}) for one in (recipe, load_recipe("local-model")))
    assert mine == its


def test_template_is_named_after_the_model() -> None:
    assert "\nname: qwen3-0.6b-hif8\n" in template("Qwen/Qwen3-0.6B")


# --- choices


def test_choices_of_the_schema_are_those_of_the_tables() -> None:
    sections = json_schema()["$defs"]
    for section, key, table in (
        ("QatConfig", "format", FORMATS),
        ("RoleConfig", "granularity", GRANULARITIES),
        ("ScalingConfig", "algorithm", RULES),
    ):
        assert sections[section]["properties"][key]["enum"] == list(table)


def test_scaling_says_what_a_scheme_does() -> None:
    assert ScalingConfig().model_dump() == asdict(Scaling())


def test_importing_recipes_leaves_the_heavy_packages_alone() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'lm_eval'}"
    code = f"import sys, qatrun.recipe as r; r.load_recipe('demo'); print(sorted({heavy} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- merging: extends, arms, --set


def test_extends_merges_mappings_and_replaces_lists_and_null(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "name: base\nmodel: {path: m, revision: r}\ndata: {train: {path: d}}\ntrain: {steps: 1000, betas: [0.8, 0.9]}\n"
        "qat: {targets: [a, b], grad_output: {target_amax: 15}, scaling: {window: 8, algorithm: most_recent}}\n"
        "eval: {tasks: {mmlu: 5}}\n",
        encoding="utf-8",
    )
    child = tmp_path / "child.yaml"
    child.write_text(
        "extends: base.yaml\nname: child\ntrain: {seed: 7}\n"
        "qat: {targets: [c], grad_output: null, scaling: {window: 16}}\n",
        encoding="utf-8",
    )
    recipe = load_recipe(child)
    assert (recipe.name, recipe.model.revision) == ("child", "r")
    assert (recipe.train.steps, recipe.train.seed, recipe.train.betas) == (1000, 7, (0.8, 0.9))
    assert recipe.qat is not None
    assert (recipe.qat.targets, recipe.qat.grad_output) == (("c",), None)
    assert recipe.qat.scaling == ScalingConfig(window=16, algorithm="most_recent")


def test_a_shipped_recipe_can_be_extended_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo\nname: mine\nqat: {format: int8}\n", encoding="utf-8")
    assert load_recipe(path) == load_recipe("demo", ["name=mine", "qat.format=int8"])


def test_set_reaches_every_arm_that_inherits_the_key() -> None:
    recipe = load_recipe("demo", ["qat.scaling.window=16", "arms.fp8.qat.format=fp8_e4m3", "arms.fp8.twin=bf16"])
    assert recipe.arm_names == ("bf16", "hif8", "fp8")
    arms = recipe.arm_by_name.values()
    assert [arm.twin for arm in arms] == [None, "bf16", "bf16"]
    configs = [arm.qat and (arm.qat.format, arm.qat.scaling.window) for arm in arms]
    assert configs == [None, ("hif8", 16), ("fp8_e4m3", 16)]


def test_set_replaces_a_mapping_and_later_ones_win() -> None:
    recipe = load_recipe("demo", ["arms={a: {qat: null}, b: {}}", "train.steps=100", "train.steps=200"])
    assert recipe.arm_names == ("a", "b")
    assert recipe.train.steps == 200


def test_set_reads_values_as_yaml() -> None:
    recipe = load_recipe(
        "demo", ["train.learning_rate=3e-5", "qat.grad_output={}", "eval.limit=null", "model.path='5'"]
    )
    assert recipe.train.learning_rate == 3e-5
    assert recipe.qat is not None
    assert recipe.qat.grad_output == RoleConfig()
    assert (recipe.eval.limit, recipe.model.path) == (None, "5")


def test_arms_are_laid_over_the_recipe() -> None:
    recipe = _recipe(
        qat={
            "scaling": {"window": 8, "algorithm": "most_recent"},
            "weight": {"target_amax": 7, "scaling": {"window": 4}},
        },
        arms={"bf16": {"qat": None}, "late": {"qat": {"start_step": 700, "weight": {"format": "int8"}}}, "plain": None},
    )
    late, plain = recipe.arm_by_name["late"], recipe.arm_by_name["plain"]
    assert late.qat is not None
    weight = late.qat.schemes["weight"]
    assert (weight.format, weight.target_amax) == ("int8", 7.0)
    assert weight.scaling == Scaling(window=4, algorithm="most_recent")
    assert late.qat.schemes["input"].scaling.window == 8
    assert (late.switch_step, plain.switch_step, recipe.arm_by_name["bf16"].switch_step) == (700, 500, None)
    assert plain.qat == recipe.qat


def test_default_arms_are_bf16_and_the_format() -> None:
    assert _recipe(qat={"format": "int8"}).arm_names == ("bf16", "int8")
    assert _recipe(qat=None).arm_names == ("bf16",)


def test_every_task_has_a_budget() -> None:
    recipe = _recipe(eval={"tasks": {"mmlu": 5, "hellaswag": 10}}, budget={"hellaswag": 0.5})
    assert recipe.budget == {"mmlu": 1.0, "hellaswag": 0.5, "perplexity": 1.0}


def test_sections_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        _recipe().train.steps = 5  # type: ignore[misc]


# --- roles


def test_roles_inherit_format_target_and_scaling() -> None:
    qat = QatConfig(
        format="hif8",
        scaling=ScalingConfig(window=8, algorithm="most_recent"),
        weight=RoleConfig(format="int8", scaling=RoleScaling(window=4)),
        grad_output=RoleConfig(),
    )
    weight, inputs, gradients = qat.schemes.values()
    assert (weight.format, weight.target_amax) == ("int8", 127.0)
    assert weight.scaling == Scaling(window=4, algorithm="most_recent")
    assert (inputs.format, inputs.target_amax, inputs.scaling) == (
        "hif8",
        15.0,
        Scaling(window=8, algorithm="most_recent"),
    )
    assert (gradients.format, gradients.target_amax) == ("hif8", 224.0)


def test_gradients_are_not_quantized_by_default() -> None:
    assert list(QatConfig().schemes) == ["weight", "input"]


def test_scales_finer_than_a_tensor_are_dynamic() -> None:
    qat = QatConfig(
        scaling=ScalingConfig(type="static", window=8),
        weight=RoleConfig(granularity="per_channel"),
        input=RoleConfig(granularity="per_token", scaling=RoleScaling(window=2)),
    )
    assert qat.schemes["weight"].scaling == Scaling(type="dynamic", window=8)
    assert qat.schemes["input"].scaling == Scaling(type="dynamic", window=2)


# --- the resolved recipe


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["qat=null", "arms={bf16: {}}"],
        ["qat.weight={granularity: per_channel}", "qat.scaling.algorithm=most_recent", "qat.input.scaling.window=3"],
        ["qat.targets=['re:.*mlp\\..*', \"it's\"]", "train.learning_rate=1e-5"],
        ["data.train.messages_column=m"],
        ["arms.chat.data.train.messages_column=m", "arms.chat.qat.scaling.algorithm=most_recent"],
        ["model.path='null'", "model.revision='1e5'", "data.train.path='# no: comment'"],
    ],
)
def test_resolved_recipe_loads_back_equal(overrides: list[str], tmp_path: Path) -> None:
    recipe = load_recipe("demo", overrides)
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    loaded = load_recipe(path)
    assert loaded == recipe
    for name in recipe.arm_names:
        arm, again = recipe.arm_by_name[name], loaded.arm_by_name[name]
        assert again == arm
        assert (again.qat and again.qat.schemes) == (arm.qat and arm.qat.schemes)


def test_keys_that_studies_once_lacked_are_not_written_while_null() -> None:
    written = load_recipe("demo", ["qat.weight.scaling.window=3"]).model_dump(mode="json")
    assert {"text_column", "roles"}.isdisjoint(written["data"]["train"])
    assert written["qat"]["weight"]["scaling"] == {"window": 3}


def test_the_recipe_of_a_seed_loads_back_equal(tmp_path: Path) -> None:
    from qatrun.study.replicas import replica_recipe

    overrides = ["train.seeds=[0, 7]", "arms.hot={train: {learning_rate: 1e-3}, twin: bf16}"]
    one = replica_recipe(load_recipe("demo", overrides), 7)
    assert {(arm.train.seed, arm.train.seeds) for arm in one.arm_by_name.values()} == {(7, None)}
    path = tmp_path / "seed.yaml"
    path.write_text(one.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == one


def test_a_recipe_that_no_loader_made_has_no_arms_to_run() -> None:
    with pytest.raises(TypeError, match="make a recipe with load_recipe or parse_recipe"):
        Recipe.model_validate(load_recipe("demo").model_dump(mode="json")).arm_by_name  # noqa: B018


# --- any input gives a recipe or a list of mistakes

DEMO = (recipes_dir() / "demo.yaml").read_text(encoding="utf-8")
NOISE = st.text("ab:{}[]-#&*!|>'\"\\\n\t 1.", max_size=6)
SCALARS = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.sampled_from(["", "hif8", "bf16", "re:("])
KEYS = st.sampled_from(["qat", "weight", "scaling", "arms", "type", "tasks", "train", "path", "x"])
TREES = st.recursive(SCALARS, lambda below: st.lists(below, max_size=2) | st.dictionaries(KEYS, below, max_size=3))
PLACES = st.sampled_from(
    [
        *("name", "model", "data.train", "train", "train.steps", "train.betas"),
        *("warmup", "eval", "eval.tasks", "budget"),
        *("qat", "qat.weight", "qat.scaling", "qat.grad_output", "qat.targets"),
        *("arms", "arms.bf16", "arms.hif8", "arms.hif8.qat"),
    ]
)


@settings(max_examples=150, deadline=None)
@given(path=PLACES, value=TREES)
def test_any_value_anywhere_gives_a_recipe_or_mistakes(path: str, value: Any) -> None:
    values = load_recipe("demo").model_dump(mode="json")
    *above, key = path.split(".")
    owner = values
    for part in above:
        owner = owner[part]
    owner[key] = value
    try:
        recipe = parse_recipe(values)
    except RecipeError as error:
        problems = error.problems
    else:
        problems = ()
        assert [arm.name for arm in recipe.arm_by_name.values()] == list(recipe.arms)
    assert all(problem.key for problem in problems)


@settings(max_examples=150, deadline=None)
@given(start=st.integers(0, len(DEMO)), length=st.integers(0, 30), inserted=NOISE)
def test_any_damage_to_a_file_gives_a_recipe_or_mistakes(start: int, length: int, inserted: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.yaml"
        path.write_text(DEMO[:start] + inserted + DEMO[start + length :], encoding="utf-8")
        try:
            load_recipe(path)
        except RecipeError as error:
            problems = error.problems
        else:
            problems = ()
    assert all(problem.where.startswith(f"{path}:") for problem in problems)


def _document(tree: dict[str, Any], file: str) -> Document:
    document = Document(tree, {(): Place(file, (0, 0))})
    _add_places(document, tree, (), Place(file, (0, 0)))
    return document


def _add_places(document: Document, tree: dict[str, Any], path: tuple[str, ...], place: Place) -> None:
    for key, value in tree.items():
        document.places[(*path, key)] = place.below((key,))
        if isinstance(value, dict):
            _add_places(document, value, (*path, key), place.below((key,)))


def _leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, (*path, key)) if isinstance(value, dict) and value else {(*path, key): value}
    return leaves


MAPPINGS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3) | st.none(), max_size=3),
    lambda below: st.dictionaries(st.sampled_from("abc"), below | st.integers(0, 3), max_size=3),
)


@given(base=MAPPINGS, overrides=MAPPINGS)
def test_merging_keeps_every_leaf_with_the_place_it_came_from(base: dict[str, Any], overrides: dict[str, Any]) -> None:
    merged = merge(_document(base, "base"), _document(overrides, "over"))
    assert merged.places.keys() == _document(merged.tree, "").places.keys()
    for path, value in _leaves(merged.tree).items():
        source, leaves = ("over", _leaves(overrides)) if path in _leaves(overrides) else ("base", _leaves(base))
        if value != {}:
            assert (value, merged.place(path).where) == (leaves[path], source)
        assert merged.place(path).key == ".".join(path)
