"""Whose a study's folder is: what may be thrown away, and what a resume may have changed.

Lock, look, decide, change: what is refused changes nothing, and nothing changes under a process that runs the study.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from filelock import FileLock, Timeout

from qatrun.errors import DamagedFileError, InputError, Problem
from qatrun.files import read_json, replace_file, write_json, writing
from qatrun.layout import EXPORT_FILE, LOCK_FILE, StudyFolder
from qatrun.recipe import Recipe, load_recipe
from qatrun.records.environment import StudyEnvironment
from qatrun.study.contents import is_free, is_study, own_files, saved_recipe, strangers
from qatrun.study.inputs import describe_inputs, input_problems
from qatrun.text import flat

# Sections that no number of an arm depends on: what is watched, asked, judged and exported, not what is trained and scored.
FREE_SECTIONS = {"budget", "contrasts", "diagnose", "export", "monitor", "target"}
# Where a study lies: it may be moved to a larger disk.
PLACE = {"name", "output_dir"}

Say = Callable[[str], None]


@contextmanager
def claimed(folder: StudyFolder, recipe: Recipe, *, resume: bool, overwrite: bool, warn: Say) -> Iterator[None]:
    """Make the folder this recipe's, and this process's for as long as the block lasts, without losing anything that a
    user has not given up.

    Raises:
        InputError: another process runs the study, the folder holds something that neither option covers, or a resume
            changes more than it may.
        WriteError: it cannot be written to.
    """
    _refuse(folder, recipe, resume=resume, overwrite=overwrite)  # before even a lock is put into a stranger's folder
    with locked(folder):
        _refuse(folder, recipe, resume=resume, overwrite=overwrite)
        if overwrite:
            _throw_away(folder, warn)
        _take_up(folder, recipe, warn)
        yield


@contextmanager
def locked(folder: StudyFolder) -> Iterator[None]:
    """Keep other processes from running the study.

    Raises:
        InputError: one does already.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.path / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(Problem(f"another process is running the study in {folder.path}", "name")) from None
    try:
        yield
    finally:
        lock.release()


def _refuse(folder: StudyFolder, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Look and decide; changes nothing.

    Raises:
        InputError: as `claimed`.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise InputError(Problem(f"{folder.path} is a file; give another name", "name"))
    if is_free(folder) or (overwrite and is_study(folder)):
        return
    if not is_study(folder):
        raise InputError(Problem(f"{folder.path} holds something that is no study; give another name", "name"))
    if not resume:
        raise InputError(Problem(_occupied(folder), "name"))
    if problems := _other_settings(folder, recipe) or input_problems(folder, recipe):
        raise InputError(problems)


def _occupied(folder: StudyFolder) -> str:
    state, more = "unfinished", "--resume to go on with it, "
    if _is_finished(folder):
        state, more = "finished", ""
    return f"{folder.path} holds a study that is {state} ({more}--overwrite to throw it away, or another name)"


def _is_finished(folder: StudyFolder) -> bool:
    """Whether a resume would find nothing to do but compare again."""
    recipe = saved_recipe(folder)
    if recipe is None:
        return False
    if recipe.train.seeds is not None or recipe.contrasts:
        return folder.seeds.is_file()
    exports = ((folder.arm(arm.name), name) for arm in recipe.arm_by_name.values() if arm.qat for name in arm.export)
    if not all((arm.path / name / EXPORT_FILE).is_file() for arm, name in exports):
        return False
    diagnoses = recipe.diagnose.at_end and any(arm.twin for arm in recipe.arm_by_name.values())
    return folder.comparison.is_file() and (folder.diagnosis.is_file() or not diagnoses)


def _throw_away(folder: StudyFolder, warn: Say) -> None:
    """Delete what is the study's, once no other process runs one of its seeds; what is not is left and named."""
    with ExitStack() as locks:
        for replica in folder.replicas:
            locks.enter_context(locked(replica))
        left, own = strangers(folder), own_files(folder)
        folders = {parent for file in own for parent in file.parents if folder.path in parent.parents}
        with writing(folder.path):
            for file in own:
                file.unlink(missing_ok=True)
            for path in sorted(folders, reverse=True):
                with suppress(OSError):  # one that is not empty
                    path.rmdir()
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        warn(f"left in {folder.path}, as no part of the study that was thrown away: {shown}")


def _take_up(folder: StudyFolder, recipe: Recipe, warn: Say) -> None:
    """Write what a study begins with, as far as it is not there or says something else by now."""
    inputs = describe_inputs(recipe)
    try:
        environment = read_json(folder.environment, StudyEnvironment)
        inputs |= environment.inputs
    except DamagedFileError as error:
        if folder.environment.is_file():
            warn(f"{error}; written anew: it says what the study goes on with, not what it began with")
        from qatrun.study.environment import describe_environment  # loads torch

        environment = describe_environment()
    current = environment.model_copy(update={"inputs": inputs})
    if current.to_dict() != environment.to_dict():
        write_json(folder.environment, current)
    saved = saved_recipe(folder)  # None: `_refuse` permits that in a folder that is free
    if saved != recipe:
        if saved is not None:
            for results in (folder.comparison, folder.seeds, folder.seeds.with_suffix(".csv")):
                results.unlink(missing_ok=True)  # they answer the earlier recipe, and say that the study is finished
        replace_file(folder.recipe, recipe.to_yaml().encode())


def _other_settings(folder: StudyFolder, recipe: Recipe) -> list[Problem]:
    """Why the recipe may not replace the saved one: some number of an arm or seed that is there would change. Arms and
    seeds may be added, an arm that was not finished (an alarm may have stopped it) may be given up, and sections that
    only watch, ask or judge may say something else.

    Raises:
        RecipeError: the saved one cannot be read.
    """
    if not folder.recipe.is_file():
        return []
    saved = load_recipe(folder.recipe)
    removed = [name for name in saved.arm_names if name not in recipe.arms and _has_result(folder, name)]
    changed = [f"arms.{name} (removed)" for name in removed] + _changes(saved, recipe)
    what = ", ".join(changed[:5])
    message = f"{folder.path} was made with other settings: {what}; --overwrite it or give another name"
    return [Problem(message, "name")] if changed else []


def _has_result(folder: StudyFolder, arm: str) -> bool:
    return any(study.arm(arm).result.is_file() for study in (folder, *folder.replicas))


def _changes(saved: Recipe, now: Recipe) -> list[str]:
    before, after = flat(_settled(saved, saved, now)), flat(_settled(now, saved, now))
    both = {key: (_shown(before, key), _shown(after, key)) for key in sorted(before.keys() | after.keys())}
    return [f"{key} ({old} -> {new})" for key, (old, new) in both.items() if old != new]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not given"


def _settled(recipe: Recipe, saved: Recipe, now: Recipe) -> dict[str, Any]:
    """What numbers depend on that are there or under way: of the arms those of both recipes, and nothing of the seeds
    where some are only added."""
    tree = recipe.model_dump(mode="json", exclude=FREE_SECTIONS | PLACE)
    tree["arms"] = {
        name: {section: value for section, value in recipe.arms[name].items() if section not in FREE_SECTIONS}
        | {"twin": recipe.arm_by_name[name].twin}
        for name in saved.arm_names
        if name in now.arms
    }
    if saved.train.seeds is not None and now.train.seeds is not None and {*saved.train.seeds} <= {*now.train.seeds}:
        del tree["train"]["seeds"]
    return tree
