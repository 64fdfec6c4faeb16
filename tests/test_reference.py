"""What is generated for a reader says what the code does: the references of recipes and of the command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_world import run_qatrun

from qatrun.recipe import json_schema

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from reference import ROOT, main, texts, verbs  # noqa: E402

PARAMETERS = [(name, parameter) for name, verb in verbs().items() for parameter in verb.params]


def test_the_references_are_up_to_date() -> None:
    assert main(["--check"]) == 0


def test_a_stale_reference_is_noticed_and_written(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["--check"], tmp_path) == 1
    assert main([], tmp_path) == 0
    assert main(["--check"], tmp_path) == 0
    assert {file.relative_to(tmp_path) for file in texts(tmp_path)} == {file.relative_to(ROOT) for file in texts(ROOT)}


def test_every_key_of_a_recipe_is_described() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    bare = [key for section in sections for key, field in section["properties"].items() if not field.get("description")]
    assert bare == []


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_has_help_that_names_all_it_takes(tmp_path: Path, verb: str) -> None:
    assert verbs()[verb].help.endswith(".")
    ran = run_qatrun(verb, "--help", cwd=tmp_path)
    assert ran.code == 0
    assert ran.out.startswith(f"Usage: qatrun {verb}")
    for name, parameter in PARAMETERS:
        if name == verb:
            names = [parameter.metavar] if parameter.param_type_name == "argument" else parameter.opts
            assert all(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", ran.out) for name in names), names
    assert verb in run_qatrun("--help", cwd=tmp_path).out


@pytest.mark.parametrize(("verb", "parameter"), PARAMETERS, ids=[f"{verb} {p.name}" for verb, p in PARAMETERS])
def test_every_argument_and_option_says_what_it_is(verb: str, parameter: Any) -> None:
    assert (parameter.help or "").endswith("."), verb
    assert parameter.metavar or parameter.is_flag, "an option that takes a value says of what kind"
