"""What a study is made from, by content: text and model must not change under it, else its parts are not of one piece.
Checksums of all of it are kept in environment.json.

What comes from the hub is not looked at: it is fetched by revision.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from qatrun.errors import DamagedFileError, InputError, Problem
from qatrun.files import content_sha256, read_json
from qatrun.layout import StudyFolder
from qatrun.recipe import Recipe
from qatrun.records.environment import StudyEnvironment

TEACHER_KEY = "train.distill.teacher"
# What a model's folder is read for. That of another study's arm holds more, which may change.
MODEL_FILES = (
    *("config.json", "*.safetensors", "*.bin", "*.py"),
    *("tokenizer*", "*.model", "vocab*", "merges.txt", "*.jinja"),
)


def describe_inputs(recipe: Recipe) -> dict[str, str]:
    """Path, as the recipe has it, of each text and model that lies here -> SHA-256 of its content."""
    found = {path: _files(Path(path).expanduser(), key, Path(recipe.output_dir)) for path, key in _keys(recipe).items()}
    return {path: _digest(Path(path).expanduser(), files) for path, files in found.items() if files}


def input_problems(folder: StudyFolder, recipe: Recipe) -> list[Problem]:
    """What has changed since the study began. Where that is not known, an earlier version having begun it, nothing."""
    try:
        began = read_json(folder.environment, StudyEnvironment).inputs
    except DamagedFileError:
        return []  # which the claim says
    keys = _keys(recipe)
    return [
        Problem(
            f"{path} has changed since {folder.path} was begun with it, and what is there would not belong together with "
            "what comes: put it back as it was, --overwrite the study or give another name",
            keys[path],
        )
        for path, digest in describe_inputs(recipe).items()
        if began.get(path, digest) != digest
    ]


def check_inputs(folder: StudyFolder, recipe: Recipe) -> None:
    """Make sure, before text or model is read again, that they are what the study began with.

    Raises:
        InputError: one of them has changed.
    """
    if problems := input_problems(folder, recipe):
        raise InputError(problems)


def _keys(recipe: Recipe) -> dict[str, str]:
    """Path of every text and model -> its key in the recipe."""
    keys: dict[str, str] = {}
    for arm in recipe.arm_by_name.values():
        keys.setdefault(arm.model.path, "model.path")
        if arm.teacher is not None:
            keys.setdefault(arm.teacher.path, TEACHER_KEY)
        for key in ("train", "valid", "probe"):
            source = getattr(arm.data, key)
            if source is not None:
                keys.setdefault(source.path, f"data.{key}.path")
    return keys


def _files(path: Path, key: str, output_dir: Path) -> list[Path]:
    """Of a folder, those that are read; the studies in it, and hidden files, are no text."""
    if path.is_file():
        return [path]
    if key in ("model.path", TEACHER_KEY):
        return sorted({file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    studies = output_dir.resolve()
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and studies not in file.resolve().parents
    )


def _digest(path: Path, files: list[Path]) -> str:
    """Of a file, its own; of a folder, of the names and contents of its files."""
    if files == [path]:
        return content_sha256(path)
    lines = [f"{file.relative_to(path)} {content_sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
