"""The recipes that ship with the package: `recipes/` of a checkout, `qatrun/_recipes/` of an installed wheel."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from qatrun.errors import Problem, RecipeError
from qatrun.text import suggestion

TEMPLATE = "local-model"


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe to run by name.

    Attributes:
        purpose: its first line, one sentence.
    """

    name: str
    path: Path
    purpose: str


def recipes_dir() -> Path:
    """The folder that the shipped recipes are in."""
    package = Path(__file__).parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> tuple[ShippedRecipe, ...]:
    """Every shipped recipe, by name."""
    return tuple(ShippedRecipe(path.stem, path, _purpose(path)) for path in sorted(recipes_dir().glob("*.yaml")))


def find_recipe(name: str) -> ShippedRecipe:
    """The shipped recipe of that name.

    Raises:
        RecipeError: there is none; the message names the nearest one.
    """
    recipes = {recipe.name: recipe for recipe in shipped_recipes()}
    if name not in recipes:
        raise RecipeError(Problem(f"no file or shipped recipe named '{name}'{suggestion(name, recipes)}"))
    return recipes[name]


def template(model: str, data: str | None = None) -> str:
    """The text of a commented recipe for a model, to be edited by its user.

    Args:
        model: hub id or folder.
        data: hub id, file or folder of text; None leaves a place to name one.
    """
    text = find_recipe(TEMPLATE).path.read_text(encoding="utf-8")
    words = re.findall(r"[a-z0-9._]+", model.rstrip("/").split("/")[-1].lower())
    name = re.sub(r"\.{2,}", ".", "-".join(words)).strip("._") or "my"
    text = re.sub(r"(?m)^name: .*$", f"name: {name}-hif8", text, count=1)
    for indent, path in (("  ", model), ("    ", data)):
        if path is not None:
            before, after = re.split(rf"(?m)^{indent}path: \S+", text, maxsplit=1)
            text = f"{before}{indent}path: {json.dumps(path, ensure_ascii=False)}{after}"
    return text


def _purpose(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return lines.readline().removeprefix("#").strip()
