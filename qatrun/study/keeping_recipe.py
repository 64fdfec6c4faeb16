"""The choice of a sensitivity search as a recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qatrun.recipe import Recipe
from qatrun.recipe.document import Document, as_yaml, deep_merge, with_override
from qatrun.records.sensitivity import Sensitivity


def keeping_recipe(folder: Path, recipe: Recipe, found: Sensitivity, overrides: Sequence[str]) -> str:
    """YAML that extends the recipe that was asked about, and leaves the chosen groups in BF16.

    Args:
        folder: that it is written into.
        overrides: the `--set`s that the recipe was loaded with.
    """
    is_file = Path(found.recipe).is_file()
    tree: dict[str, Any] = {"extends": os.path.relpath(found.recipe, folder) if is_file else found.recipe}
    document = Document({})
    for position, override in enumerate(overrides):
        document = with_override(document, override, position)[0]
    tree |= document.tree
    tree["name"] = f"{recipe.name}-keep"
    qat = recipe.arm_by_name[found.arm].qat
    assert qat is not None
    given = [module.model_dump(mode="json") for module in qat.modules]
    own = [{"match": group.linears, "format": None} for group in found.groups if group.kept]
    section: Any = {"qat": {"modules": [*own, *given]}}
    if sum(arm.qat is not None for arm in recipe.arm_by_name.values()) > 1:
        section = {"arms": {found.arm: section}}
    said = "\n".join(f"# {line}" for line in found.answer.split("; "))
    by = f"# {recipe.name}, {found.arm}: by qatrun sensitivity, {found.method}"
    return f"{by}\n{said}\n{as_yaml(deep_merge(tree, section))}"
