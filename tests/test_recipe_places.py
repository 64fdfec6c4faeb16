"""Where a mistake is reported: in the file, the parent or the `--set` that it was made in, or where it can be mended."""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty_recipe import RECIPE, lines_of

from qatrun.errors import Problem, RecipeError
from qatrun.recipe import load_recipe, locate, parse_recipe


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_mistakes_of_file_and_set_come_together() -> None:
    lines = lines_of(RECIPE.replace("hif8\n", "hif9\n", 1), ["train.steps=0"])
    assert lines == [
        "r.yaml:7: qat.format -- unknown format 'hif9' (did you mean 'hif8'?)",
        "--set train.steps=0: train.steps -- must be at least 1 (got 0)",
    ]


def test_a_mistake_in_a_parent_is_reported_there() -> None:
    Path("base").mkdir()
    Path("base/b.yaml").write_text(RECIPE.replace("1000", "0"), encoding="utf-8")
    lines = lines_of("extends: base/b.yaml\nqat:\n  clip: formt\n")
    assert lines == [
        "r.yaml:3: qat.clip -- unknown clip 'formt' (did you mean 'format'?)",
        "base/b.yaml:5: train.steps -- must be at least 1 (got 0)",
    ]


def test_a_circle_of_parents() -> None:
    Path("a.yaml").write_text("extends: r.yaml\n", encoding="utf-8")
    assert lines_of(RECIPE + "extends: a.yaml\n") == ["a.yaml:1: extends -- 'r.yaml' extends this recipe in turn"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "r.yaml:1: a recipe must be a mapping of keys to values"),
        ("name: a\x01b\n", "r.yaml:1: not valid YAML: special characters are not allowed (#x01)"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, expected: str) -> None:
    assert lines_of(text) == [expected]


def test_an_empty_file_lacks_everything() -> None:
    required = ("name", "model", "data", "train", "eval")
    assert lines_of("# nothing\n") == [f"r.yaml:1: {key} -- required, but missing" for key in required]


@pytest.mark.parametrize(
    ("path_or_name", "expected"),
    [
        ("missing.yaml", "missing.yaml: no such file"),
        ("dmeo", "no file or shipped recipe named 'dmeo' (did you mean 'demo'?)"),
    ],
)
def test_no_such_recipe(path_or_name: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path_or_name)
    assert str(caught.value) == expected


def test_a_mapping_made_in_python_has_no_line() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"name": "x", "model": {"path": "m"}, "data": {"train": {"path": "d"}}, "train": {"steps": -1}})
    assert str(caught.value).splitlines() == [
        "train.steps -- must be at least 0 (got -1)",
        "eval -- required, but missing",
    ]


def test_problems_found_later_get_the_line_of_their_key() -> None:
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")
    found = [
        Problem("set", "train.seed"),
        Problem("absent", "qat.targets"),
        Problem("written", "data.train.path"),
        Problem("has no key"),
    ]
    assert [str(problem) for problem in locate(found, "r.yaml", ["train.seed=3"])] == [
        "has no key",
        "r.yaml:3: data.train.path -- written",
        "r.yaml:6: qat.targets -- absent",
        "--set train.seed=3: train.seed -- set",
    ]
