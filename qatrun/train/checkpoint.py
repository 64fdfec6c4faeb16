"""Checkpoints that are whole or not there.

    checkpoints/step-000500/
      model.safetensors       parameters
      optimizer.safetensors   AdamW's moments and step, by parameter name
      state.safetensors       tensors of all other parts, as `<part>/<name>`
      progress.json           step, what run it belongs to, and the plain data of each part
      manifest.json           SHA-256 of each of the files above

A checkpoint is written into a temporary folder, flushed to disk and renamed. The manifest is checked before a checkpoint
is used, so a damaged one is found out and the one before it taken.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qatrun.errors import CheckpointError, DamagedFileError, Problem
from qatrun.files import filled_folder, flush_to_disk, read_json, reading, sha256, writing
from qatrun.layout import INCOMPLETE, MANIFEST_FILE, PROGRESS_FILE, by_step, step_name
from qatrun.records.training import Progress
from qatrun.train.parts import State

LARGE = ("model", "optimizer")  # parts with a file of their own
SHARED = "state"
FILES = {*(f"{name}.safetensors" for name in (*LARGE, SHARED)), PROGRESS_FILE}


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on bit for bit.

    Attributes:
        step: number of optimizer steps done.
        identity: of the run, see `Segment`.
        parts: name -> what the part gave as its state.
    """

    step: int
    identity: str
    parts: Mapping[str, State]


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep_last: int, save_every: int = 1) -> Path:
    """Write `folder/step-NNNNNN` atomically, then drop all but the newest `keep_last` up to it. Later ones are dropped
    too: they are damaged, else the run would have gone on from them. So are earlier ones that `save_every` does not
    give: a run that was stopped there keeps the same ones as a run that was not.

    Raises:
        WriteError: a full disk, a missing permission; the earlier ones are as they were.
    """
    target = folder / step_name(checkpoint.step)
    temporary = folder / INCOMPLETE
    with writing(target):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _write_files(temporary, checkpoint)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk its room is wanted
            raise
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        flush_to_disk(folder)
    there = by_step(folder)
    due = [step for step in there if step < checkpoint.step and step % save_every == 0]
    for old in there.keys() - [*due, checkpoint.step][-keep_last:]:
        shutil.rmtree(there[old])
    return target


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in (*LARGE, SHARED)}
    progress: dict[str, Any] = {"step": checkpoint.step, "identity": checkpoint.identity}
    for part, state in checkpoint.parts.items():
        file, prefix = (part, "") if part in LARGE else (SHARED, f"{part}/")
        tensors[file] |= {f"{prefix}{key}": t.contiguous() for key, t in state.items() if isinstance(t, Tensor)}
        progress[part] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    with filled_folder(folder):
        for name, content in tensors.items():
            save_file(content, folder / f"{name}.safetensors")
        (folder / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
        manifest = {name: sha256(folder / name) for name in sorted(FILES)}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush_to_disk(path)


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint in a folder, and a sentence on each newer one that is damaged."""
    warnings: list[str] = []
    for candidate in reversed(by_step(folder).values()):
        try:
            return read_checkpoint(candidate), warnings
        except CheckpointError as error:
            warnings.append(f"{error}; going back to the checkpoint before it")
    return None, warnings


def has_checkpoint(folder: Path) -> bool:
    """Whether any checkpoint in a folder is whole."""
    for candidate in by_step(folder).values():
        with suppress(DamagedFileError):
            _check_files(candidate)
            return True
    return False


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint whose files are what its manifest says.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        _check_files(folder)
        progress: Mapping[str, Any] = read_json(folder / PROGRESS_FILE, Progress)
        parts: dict[str, dict[str, Any]] = {key: value for key, value in progress.items() if isinstance(value, dict)}
        for file in (*LARGE, SHARED):
            with reading(folder / f"{file}.safetensors"):
                tensors = load_file(folder / f"{file}.safetensors")
            for key, tensor in tensors.items():
                part, _, name = key.partition("/") if file == SHARED else (file, "/", key)
                parts.setdefault(part, {})[name] = tensor
        if step_name(progress["step"]) != folder.name:
            raise DamagedFileError(Problem(f"it is one of step {progress['step']}"))
    except DamagedFileError as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {error}") from error
    parts.setdefault("clock", dict(progress))  # what it holds lay beside the step before it was a part
    return Checkpoint(progress["step"], progress["identity"], parts)


def _check_files(folder: Path) -> None:
    """
    Raises:
        DamagedFileError: a file is missing, or is not what the manifest says.
    """
    manifest = read_json(folder / MANIFEST_FILE, dict[str, str])
    if missing := sorted(FILES - manifest.keys()):
        raise DamagedFileError(Problem(f"{MANIFEST_FILE} lacks {', '.join(missing)}"))
    damaged = []
    for name in sorted(FILES):
        with reading(folder / name):
            if sha256(folder / name) != manifest[name]:
                damaged.append(name)
    if damaged:
        raise DamagedFileError(Problem(f"{', '.join(damaged)} changed since it was written"))
