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
README_FILE = ROOT / "README.md"
README = README_FILE.read_text(encoding="utf-8")
COMMANDS = [" ".join(line.split()) for line in re.findall(r"^    (qatrun .*(?:\\\n.*)*)", README, re.MULTILINE)]


def test_every_shipped_recipe_is_named() -> None:
    for recipe in shipped_recipes():
        assert f"`{recipe.name}`" in README


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


def test_it_is_short_and_leads_to_all_that_is_written() -> None:
    assert len(README.splitlines()) <= 200
    linked = set(re.findall(r"\]\((docs/[\w.-]+)\)", README))
    assert linked == {f"docs/{file.name}" for file in (ROOT / "docs").iterdir() if file.name[0] != "."}


@pytest.mark.parametrize("page", [README_FILE, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for address in re.findall(r"\]\(([^)\s]+)\)", text):
        if address.startswith("https://"):
            continue
        file, _, anchor = address.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), address
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_help_names_the_verbs_that_the_readme_names(tmp_path: Path) -> None:
    listed = re.findall(r"^    qatrun (\w+) +[A-Z]", README[README.index("<!-- verbs") :], re.MULTILINE)
    shown = run_qatrun("--help", cwd=tmp_path).out
    assert listed == re.findall(r"^  ([a-z]+) +[A-Z]", shown[shown.index("Commands:") :], re.MULTILINE)


@pytest.mark.parametrize("verb", sorted({command.split()[1] for command in COMMANDS}))
def test_every_verb_and_option_shown_exists(verb: str, tmp_path: Path) -> None:
    help_text = run_qatrun(verb, "--help", cwd=tmp_path).out
    for command in COMMANDS:
        if command.split()[1] == verb:
            for option in re.findall(r"(?<=\s)--[a-z-]+", command.split("#")[0]):
                assert option in help_text
