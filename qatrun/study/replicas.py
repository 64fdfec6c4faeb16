"""The studies of a study's seeds: each is a whole one in `seed-<n>/`, made from the recipe with that seed, so that whatever
works on a study works on it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from qatrun.files import read_json, replace_file, write_json, writing
from qatrun.layout import StudyFolder
from qatrun.recipe import Recipe
from qatrun.records.training import Result
from qatrun.study.checking import Preflight
from qatrun.study.doneness import scores_lost


def replica_recipe(recipe: Recipe, seed: int) -> Recipe:
    """The recipe of one seed's study; it can be run by itself."""
    its = {"seed": seed, "seeds": None}
    arms = {
        name: arm.model_copy(update={"train": arm.train.model_copy(update=its)})
        for name, arm in recipe.arm_by_name.items()
    }
    changed = {"name": f"seed-{seed}", "output_dir": str(Path(recipe.output_dir) / recipe.name)}
    return recipe.model_copy(update={**changed, "train": recipe.train.model_copy(update=its)}).with_arms(arms)


def replica_preflight(checked: Preflight, seed: int) -> Preflight:
    """The preflight of one seed's study: nothing that it looked at depends on the seed."""
    recipe = replica_recipe(checked.recipe, seed)
    return replace(checked, recipe=recipe, arms=recipe.arm_by_name)


def share_start(source: StudyFolder, target: StudyFolder) -> None:
    """Give another seed what the start model said, which has seen no seed: the text of what it knew, and its scores. Its
    perplexity goes with them: the held-out text is the same whatever the seed (`open_data`)."""
    if source.path == target.path:
        return
    if source.start.known_text.is_file() and not target.start.known_text.is_file():
        replace_file(target.start.known_text, source.start.known_text.read_bytes())
    if not scores_lost(target.start) or scores_lost(source.start):
        return
    with writing(target.start.path):
        shutil.copytree(source.start.eval, target.start.eval, dirs_exist_ok=True)
    write_json(target.start.result, read_json(source.start.result, Result))
