"""What the README says of commands, recipes and recipes' keys is true."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from tiny_world import run_qatrun

from qatrun.recipe import load_recipe, parse_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [" ".join(line.split()) for line in re.findall(r"^    (qatrun .*(?:\\\n.*)*)", README, re.MULTILINE)]


def test_every_shipped_recipe_is_listed_with_its_purpose() -> None:
    for recipe in shipped_recipes():
        assert f"| [`{recipe.name}`](recipes/{recipe.name}.yaml) | {recipe.purpose} |" in README


def test_the_recipe_shown_is_valid() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    recipe = parse_recipe(YAML(typ="safe").load(textwrap.dedent(shown)))
    assert recipe.arm_names == ("bf16", "hif8", "int8")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("qatrun train demo")])
def test_the_overrides_shown_are_valid(command: str) -> None:
    words = command.replace("\\", "").split("#")[0].split()
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert overrides
    assert load_recipe(words[2], overrides).name != "demo"


@pytest.mark.parametrize("verb", sorted({command.split()[1] for command in COMMANDS}))
def test_every_verb_and_option_shown_exists(verb: str, tmp_path: Path) -> None:
    help_text = run_qatrun(verb, "--help", cwd=tmp_path).out
    for command in COMMANDS:
        if command.split()[1] == verb:
            for option in re.findall(r"(?<=\s)--[a-z-]+", command.split("#")[0]):
                assert option in help_text
