"""Whose a study's folder is: what may be thrown away, and what a resume may have changed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from qatrun.errors import InputError, Problem
from qatrun.evaluate.scores import replace_file
from qatrun.recipe import Recipe, load_recipe
from qatrun.study.environment import describe_environment
from qatrun.study.layout import StudyFolder, write_json

# Sections that no number of an arm depends on: what is watched, asked and judged, not what is trained and scored.
FREE_SECTIONS = {"budget", "contrasts", "diagnose", "monitor"}


def claim(folder: StudyFolder, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Make the folder this recipe's, without losing anything that a user has not given up.

    Raises:
        InputError: the folder holds something that neither option covers, or a resume changes more than it may.
    """
    if folder.path.exists() and any(folder.path.iterdir()):
        if not folder.environment.is_file():
            raise InputError(Problem(f"{folder.path} holds something that is no study; give another name", "name"))
        if overwrite:
            shutil.rmtree(folder.path)
        elif resume:
            _take_up(folder, recipe)
        else:
            raise InputError(Problem(_occupied(folder), "name"))
    if not folder.recipe.is_file():
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.environment, describe_environment())
        replace_file(folder.recipe, recipe.to_yaml().encode())


def _occupied(folder: StudyFolder) -> str:
    state, more = "unfinished", "--resume to go on with it, "
    if folder.is_finished:
        state, more = "finished", ""
    return f"{folder.path} holds a study that is {state} ({more}--overwrite to throw it away, or another name)"


def _take_up(folder: StudyFolder, recipe: Recipe) -> None:
    """Let the recipe replace the saved one, where no number of an arm or seed that is there would change: arms and seeds
    may be added, an arm that was not finished (an alarm may have stopped it) may be given up, and sections that only watch,
    ask or judge may say something else."""
    if not folder.recipe.is_file():
        return
    saved = load_recipe(folder.recipe)
    if saved == recipe:
        return
    removed = [name for name in saved.arm_names if name not in recipe.arms and _is_finished(folder, name)]
    changed = [f"arms.{name} (removed)" for name in removed] + _changes(saved, recipe)
    if changed:
        what = ", ".join(changed[:5])
        message = f"{folder.path} was made with other settings: {what}; --overwrite it or give another name"
        raise InputError(Problem(message, "name"))
    for results in (folder.comparison, folder.seeds, folder.seeds.with_suffix(".csv")):
        results.unlink(missing_ok=True)  # they answer the earlier recipe, and say that the study is finished
    replace_file(folder.recipe, recipe.to_yaml().encode())


def _is_finished(folder: StudyFolder, arm: str) -> bool:
    return any(study.arm(arm).result.is_file() for study in (folder, *folder.replicas))


def _changes(saved: Recipe, now: Recipe) -> list[str]:
    before, after = _flat(_settled(saved, saved, now)), _flat(_settled(now, saved, now))
    both = {key: (_shown(before, key), _shown(after, key)) for key in sorted(before.keys() | after.keys())}
    return [f"{key} ({old} -> {new})" for key, (old, new) in both.items() if old != new]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not given"


def _settled(recipe: Recipe, saved: Recipe, now: Recipe) -> dict[str, Any]:
    """What numbers depend on that are there or under way: of the arms those of both recipes, and nothing of the seeds
    where some are only added."""
    tree = recipe.model_dump(mode="json", exclude=FREE_SECTIONS)
    tree["arms"] = {
        name: _without_free_sections(recipe.arms[name]) | {"twin": recipe.resolve_arm(name).twin}
        for name in saved.arm_names
        if name in now.arms
    }
    if saved.train.seeds is not None and now.train.seeds is not None and {*saved.train.seeds} <= {*now.train.seeds}:
        del tree["train"]["seeds"]
    return tree


def _without_free_sections(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {section: value for section, value in overrides.items() if section not in FREE_SECTIONS}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Key path -> value; a list is one value."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        key: value for part, child in tree.items() for key, value in _flat(child, f"{prefix}.{part}".strip(".")).items()
    }
