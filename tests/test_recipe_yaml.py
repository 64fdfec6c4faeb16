"""YAML that other tools write, that nobody meant, or that is meant to hurt: one line with its place, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatrun.errors import RecipeError
from qatrun.patterns import matching_names
from qatrun.recipe import Recipe, load_recipe

RECIPE = """\
name: study
model: {path: m}
data: {train: {path: d}}
train: {steps: 1000, learning_rate: 1.0e-4}
eval: {tasks: {mmlu: 5}}
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def loaded(text: str | bytes, *overrides: str) -> Recipe:
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe("r.yaml", overrides)


def said(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        loaded(text, *overrides)
    return str(caught.value).splitlines()


LEARNING_RATE = "r.yaml:4: train.learning_rate -- not valid YAML: "
VALUES = {
    "!!bool z": "'z' is no !!bool",
    "!!int z": "'z' is no !!int",
    "!!int ''": "'' is no !!int",
    "!!float z": "'z' is no !!float",
    "!!timestamp z": "no recipe takes the tag !!timestamp",
    "!!python/object/apply:os.system ['touch pwned']": "no recipe takes the tag !!python/object/apply:os.system",
    "!!python/name:os.system ''": "no recipe takes the tag !!python/name:os.system",
    "!own z": "no recipe takes the tag !own",
    "!!set {a, b}": "no recipe takes the tag !!set",
    "9" * 5000: f"'{'9' * 40}' is no !!int",
    "9" * 400: "a whole number of 400 digits",
    '"\\ud800"': "half of a surrogate pair, which is no character",
}


@pytest.mark.parametrize("value", VALUES)
def test_a_value_that_is_none(value: str) -> None:
    assert said(RECIPE.replace("1.0e-4", value)) == [LEARNING_RATE + VALUES[value]]
    override = f"train.learning_rate={value}"
    assert said(RECIPE, override) == [f"--set {override}: {LEARNING_RATE.partition(': ')[2]}{VALUES[value]}"]
    assert not Path("pwned").exists()


def aliases_of_aliases(inner: str, row: str) -> str:
    """600 bytes that stand for 9^10 values."""
    lines = [f"a: &a {inner}"]
    for above, below in zip("bcdefghij", "abcdefghi", strict=True):
        lines.append(f"{above}: &{above} {row.replace('*', f'*{below}')}")
    return RECIPE + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        aliases_of_aliases("[x, x]", "[*, *, *, *, *, *, *, *, *]"),
        aliases_of_aliases("{k: x}", "{a: *, b: *, c: *, d: *, e: *, f: *, g: *, h: *, i: *}"),
        aliases_of_aliases("{k: x}", "{<<: [*, *, *, *, *, *, *, *, *]}"),
    ],
)
def test_aliases_of_aliases_end_soon(text: str) -> None:
    (line,) = said(text)
    assert line.endswith("not valid YAML: more than 50,000 values (aliases of aliases?)")


@pytest.mark.parametrize("loop", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}", "a: " + "[" * 3000])
def test_nesting_without_end(loop: str) -> None:
    (line,) = said(f"{RECIPE}{loop}\n")
    assert "not valid YAML: nested without end" in line


def test_merge_keys() -> None:
    text = (
        RECIPE
        + """\
arms:
  bf16: {qat: null}
  one: &one {qat: &qat {format: int8, clip: target}}
  two: {<<: *one, train: {seed: 3}}
  three: {qat: {<<: [{format: hif8}, *qat], ste: identity}}
"""
    )
    recipe = loaded(text)
    assert recipe.arms["two"] == {"qat": {"format": "int8", "clip": "target"}, "train": {"seed": 3}}
    assert recipe.arms["three"]["qat"] == {"format": "hif8", "clip": "target", "ste": "identity"}
    line = said(text.replace("clip: target", "clip: targt"))[0]
    assert line == "r.yaml:8: arms.one.qat.clip -- unknown clip 'targt' (did you mean 'target'?)"
    assert said(f"{RECIPE}qat: {{<<: 5}}\n") == [
        "r.yaml:6: qat.<< -- not valid YAML: `<<` merges a mapping, or a list of them"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RECIPE.encode("utf-16"), "r.yaml:1: not UTF-8 text (byte 0xff)"),
        (RECIPE.replace("mmlu", "caf\u00e9").encode("latin-1"), "r.yaml:5: not UTF-8 text (byte 0xe9)"),
        (RECIPE.encode() + b"# \0\n", "r.yaml:6: not valid YAML: special characters are not allowed (#x00)"),
        ("5\n", "r.yaml:1: a recipe must be a mapping of keys to values"),
        (f"{RECIPE}---\nname: b\n", "r.yaml:6: not valid YAML: but found another document"),
        (f"{RECIPE}? [a, b]\n: 1\n", "r.yaml:6: not valid YAML: a key must be a word or a number"),
        (f"{RECIPE}#{' ' * 1_000_000}", "r.yaml: no recipe is larger than 1,000,000 bytes"),
        (f"{RECIPE}extends: ''\n", "r.yaml:6: extends -- the name of a recipe must not be empty"),
        (f'{RECIPE}extends: "a\\0.yaml"\n', "r.yaml:6: extends -- must not hold a NUL character"),
        (RECIPE.replace("path: m", r'path: "a\0"'), "r.yaml:2: model.path -- must not hold a NUL character"),
        (RECIPE.replace("path: d", "path: ''"), "r.yaml:3: data.train.path -- must not be empty"),
        (f"{RECIPE}output_dir: ''\n", "r.yaml:6: output_dir -- must not be empty"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipes(text: str | bytes, expected: str) -> None:
    assert said(text) == [expected]


def test_a_byte_order_mark_is_none_of_the_text() -> None:
    assert loaded(b"\xef\xbb\xbf" + RECIPE.encode()).name == "study"


@pytest.mark.parametrize("name", ["", "a" * 5000, "."])
def test_a_name_that_no_recipe_can_have(name: str) -> None:
    with pytest.raises(RecipeError, match="recipe"):
        load_recipe(name)


def test_a_folder_is_no_recipe() -> None:
    Path("r.yaml").mkdir()
    with pytest.raises(RecipeError, match=r"r\.yaml: cannot be read: Is a directory"):
        load_recipe("r.yaml")


def test_the_home_folder_is_meant_everywhere(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "base.yaml").write_text(RECIPE.replace("{path: d}", "{path: ~/d}, valid: {path: ~/v}"), encoding="utf-8")
    recipe = loaded(
        "extends: ~/base.yaml\nmodel: {path: ~/m}\noutput_dir: ~/runs\neval: {data_dir: ~}\n", "eval.data_dir=~/q"
    )
    assert recipe.data.valid is not None
    paths = (recipe.model.path, recipe.data.train.path, recipe.data.valid.path, recipe.eval.data_dir, recipe.output_dir)
    assert paths == tuple(str(home / name) for name in ("m", "d", "v", "q", "runs"))
    assert load_recipe("~/base.yaml").model.path == "m"


# Every one of these takes `re` longer than anyone waits.
CATASTROPHES = ["re:(([a-z_.0-9]+)+)+!", "re:(a|aa|[a-z._0-9])+[?!]", r"re:^((\w|\.|_)+)+\$"]


@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_repeats_inside_repeats_end_soon(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatrun.patterns.MATCH_SECONDS", 0.2)
    names = [f"model.layers.{i}.self_attn.q_proj{'a' * 40}" for i in range(50)]
    try:
        assert matching_names(pattern, names) == set()
    except ValueError as error:
        assert "takes more than 0.2 s to match" in str(error)  # noqa: PT017  # either will do


def test_counts_that_unroll_into_all_memory() -> None:
    (line,) = said(f"{RECIPE}qat: {{targets: ['re:(((a{{1000}}){{1000}}){{1000}})']}}\n")
    assert line.endswith("multiply to more than 10,000")
