"""What in a study's folder is the study's, told by names and contents: the rest is somebody's, and is never deleted."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from qatrun.errors import DamagedFileError, QatrunError
from qatrun.files import read_json
from qatrun.layout import FIRST_FILES, LOCK_FILE, OF_A_STUDY, OF_AN_ARM, PARTIAL, START, TRUNK, ArmFolder, StudyFolder
from qatrun.recipe import Recipe, load_recipe
from qatrun.records.environment import StudyEnvironment
from qatrun.records.training import Result


def saved_recipe(folder: StudyFolder) -> Recipe | None:
    """The recipe that the study has; None where there is none that can be read."""
    with suppress(QatrunError, OSError):
        return load_recipe(folder.recipe)
    return None


def is_study(folder: StudyFolder) -> bool:
    """Whether qatrun made what lies there: it holds a recipe that can be run, or says what it ran on."""
    with suppress(DamagedFileError):
        read_json(folder.environment, StudyEnvironment)
        return True
    return saved_recipe(folder) is not None


def is_free(folder: StudyFolder) -> bool:
    """Whether nothing lies there, or only what a study that never got to train left of its first files, torn."""
    if not folder.path.exists():
        return True
    names = {path.name for path in folder.path.iterdir() if path.name != LOCK_FILE and not path.match(PARTIAL)}
    return (
        names <= FIRST_FILES and saved_recipe(folder) is None and all(_is_torn_or_ours(folder, name) for name in names)
    )


def own_files(folder: StudyFolder) -> set[Path]:
    """Every file that qatrun wrote there, the lock aside."""
    parts = [path for path in folder.path.iterdir() if path.is_dir() and _is_part(folder, path)]
    found = [folder.path.glob(pattern) for pattern in OF_A_STUDY]
    found += [part.glob(pattern) for part in parts for pattern in OF_AN_ARM]
    own = {file for files in found for file in files if file.is_file() or file.is_symlink()}
    return own.union(*({*own_files(replica), replica.path / LOCK_FILE} for replica in folder.replicas))


def strangers(folder: StudyFolder) -> list[str]:
    """What else lies there, relative to it."""
    own = own_files(folder) | {folder.path / LOCK_FILE}
    return sorted(
        str(file.relative_to(folder.path)) for file in folder.path.rglob("*") if file.is_file() and file not in own
    )


def _is_part(folder: StudyFolder, path: Path) -> bool:
    """Whether it is the start model's folder, a trunk's or an arm's."""
    recipe = saved_recipe(folder)
    names = {START, *(recipe.arm_names if recipe else ())}
    if path.name in names or re.fullmatch(f"{TRUNK}[0-9a-f]{{8}}", path.name):
        return True
    with suppress(DamagedFileError):  # an arm that an earlier recipe had; a copy under another name is somebody's
        return read_json(ArmFolder(path).result, Result).arm == path.name
    return False


def _is_torn_or_ours(folder: StudyFolder, name: str) -> bool:
    file = folder.path / name
    if not file.stat().st_size or is_study(folder):
        return True
    with suppress(DamagedFileError):
        read_json(file, object)
        return False
    return name != folder.recipe.name
