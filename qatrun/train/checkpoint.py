"""Checkpoints that are whole or not there.

    checkpoints/step-000500/
      model.safetensors       parameters
      optimizer.safetensors   AdamW's moments and step, by parameter name
      state.safetensors       tensors of all other parts, as `<part>/<name>`
      progress.json           step, what run it belongs to, and the plain data of each part
      manifest.json           SHA-256 of each of the files above

Several processes write, in place of the first two,

      shard-00001-....safetensors   what the first holds of both, as `model/<name>` and `optimizer/<name>`; and so on

by torch's distributed checkpointing, which says in each file's header which rows those are. Either kind is read by any
number of processes.

A checkpoint is written into a temporary folder, flushed to disk and renamed. The manifest is checked before a checkpoint
is used, so a damaged one is found out and the one before it taken.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from qatrun.errors import CheckpointError, DamagedFileError, Problem
from qatrun.files import filled_folder, flush_to_disk, read_json, reading, sha256, writing
from qatrun.layout import INCOMPLETE, MANIFEST_FILE, PROGRESS_FILE, SHARDS, by_step, step_name
from qatrun.ranks import world
from qatrun.records.training import Progress
from qatrun.train.parts import State

LARGE = ("model", "optimizer")  # parts with a file of their own, or in shards
SHARED = "state"
SMALL_FILES = {f"{SHARED}.safetensors", PROGRESS_FILE}
FILES = {*(f"{name}.safetensors" for name in LARGE), *SMALL_FILES}


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on bit for bit.

    Attributes:
        step: number of optimizer steps done.
        identity: of the run, see `Segment`.
        parts: name -> what the part gave as its state. Of one that several processes read, without the large ones, which
            `fill` reads from its folder.
        folder: it was read from.
    """

    step: int
    identity: str
    parts: Mapping[str, State]
    folder: Path | None = None


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep_last: int, save_every: int = 1) -> Path:
    """Write `folder/step-NNNNNN` atomically, then drop all but the newest `keep_last` up to it. Later ones are dropped
    too: they are damaged, else the run would have gone on from them. So are earlier ones that `save_every` does not
    give: a run that was stopped there keeps the same ones as a run that was not. Every process of a world comes here.

    Raises:
        WriteError: a full disk, a missing permission; the earlier ones are as they were.
    """
    target = folder / step_name(checkpoint.step)
    temporary = folder / INCOMPLETE
    first = world().first
    with writing(target):
        first(partial(shutil.rmtree, temporary, ignore_errors=True))
        try:
            shards = _write_shards(temporary, checkpoint) if world().size > 1 else {}
            first(partial(_write_files, temporary, checkpoint, shards))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk its room is wanted
            raise
        first(partial(_put_in_place, temporary, target))
    first(partial(_drop_others, folder, checkpoint.step, keep_last, save_every))
    return target


def _put_in_place(temporary: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    flush_to_disk(target.parent)


def _drop_others(folder: Path, last: int, keep_last: int, save_every: int) -> None:
    there = by_step(folder)
    due = [step for step in there if step < last and step % save_every == 0]
    for old in there.keys() - [*due, last][-keep_last:]:
        shutil.rmtree(there[old])


def _write_shards(folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Each process what it holds of the large parts; file -> its SHA-256 by who wrote it, on all of them."""
    world().first(partial(folder.mkdir, parents=True))
    tensors = {
        f"{part}/{key}": tensor.detach() for part in LARGE for key, tensor in checkpoint.parts.get(part, {}).items()
    }
    save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))

    def finish(rank: int) -> dict[str, str]:
        own = sorted(folder.glob(SHARDS.replace("*", f"{rank + 1:05d}-*")))
        for file in own:
            flush_to_disk(file)
        return {file.name: sha256(file) for file in own}

    found = world().shared_out(range(world().size), finish)
    return {name: digest for files in found for name, digest in files.items()}


def _write_files(folder: Path, checkpoint: Checkpoint, shards: Mapping[str, str]) -> None:
    """All but the shards, whose digests are given; without shards everything."""
    files = (SHARED,) if shards else (*LARGE, SHARED)
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in files}
    progress: dict[str, Any] = {"step": checkpoint.step, "identity": checkpoint.identity}
    for part, state in checkpoint.parts.items():
        file, prefix = (part, "") if part in LARGE else (SHARED, f"{part}/")
        if file in tensors:
            tensors[file] |= {f"{prefix}{key}": t.contiguous() for key, t in state.items() if isinstance(t, Tensor)}
        progress[part] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    with filled_folder(folder):
        for name, content in tensors.items():
            save_file(content, folder / f"{name}.safetensors")
        (folder / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
        written = SMALL_FILES if shards else FILES
        manifest = {name: sha256(folder / name) for name in sorted(written)} | dict(shards)
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in (*(file for file in folder.iterdir() if file.name not in shards), folder):
        flush_to_disk(path)


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint in a folder, and a sentence on each newer one that is damaged."""
    complaints: list[str] = []
    for candidate in reversed(world().first(partial(by_step, folder)).values()):
        try:
            return read_checkpoint(candidate), complaints
        except CheckpointError as error:
            complaints.append(f"{error}; going back to the checkpoint before it")
    return None, complaints


def has_checkpoint(folder: Path) -> bool:
    """Whether any checkpoint in a folder is whole."""
    for candidate in by_step(folder).values():
        with suppress(DamagedFileError):
            _check_files(candidate)
            return True
    return False


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint whose files are what its manifest says; several processes leave the large parts to `fill`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        _check_files(folder)
        progress: Mapping[str, Any] = read_json(folder / PROGRESS_FILE, Progress)
        parts: dict[str, dict[str, Any]] = {key: value for key, value in progress.items() if isinstance(value, dict)}
        if world().size == 1:
            for part in LARGE:
                parts[part] = parts.get(part, {}) | _read_large(folder, part)
        with reading(folder / f"{SHARED}.safetensors"):
            tensors = load_file(folder / f"{SHARED}.safetensors")
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
        if step_name(progress["step"]) != folder.name:
            raise DamagedFileError(Problem(f"it is one of step {progress['step']}"))
    except DamagedFileError as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {error}") from error
    parts.setdefault("clock", dict(progress))  # what it holds lay beside the step before it was a part
    return Checkpoint(progress["step"], progress["identity"], parts, folder)


def fill(folder: Path, parts: Mapping[str, State]) -> None:
    """Read the large parts of a checkpoint into tensors that are there, of which each process may hold some rows.

    Args:
        parts: part -> its tensors.
    """
    tensors: dict[str, Tensor] = {}
    for part, state in parts.items():
        prefix = f"{part}/" if _in_shards(folder) else ""
        tensors |= {f"{prefix}{key}": tensor.detach() for key, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=world().size == 1)


def large_shapes(folder: Path, part: str) -> dict[str, torch.Size]:
    """Name -> shape of the tensors of a large part, from the headers of its files."""
    if _in_shards(folder):
        return {key: tensor.shape for key, tensor in _empty(folder, part).items()}
    with reading(folder / f"{part}.safetensors"), safe_open(folder / f"{part}.safetensors", "pt") as file:
        return {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 -- no mapping


def _empty(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors of a part in shards, on the meta device."""
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        key.removeprefix(f"{part}/"): torch.empty(found.size, dtype=found.properties.dtype, device="meta")
        for key, found in stored.items()
        if key.startswith(f"{part}/") and isinstance(found, TensorStorageMetadata)
    }


def _read_large(folder: Path, part: str) -> dict[str, Tensor]:
    """All of a large part."""
    if not _in_shards(folder):
        with reading(folder / f"{part}.safetensors"):
            return load_file(folder / f"{part}.safetensors")
    with reading(folder / SHARDS):
        tensors = {key: torch.empty_like(empty, device="cpu") for key, empty in _empty(folder, part).items()}
        fill(folder, {part: tensors})
    return tensors


def _in_shards(folder: Path) -> bool:
    return not (folder / f"{LARGE[0]}.safetensors").is_file()


def _check_files(folder: Path) -> None:
    """Processes share the work.

    Raises:
        DamagedFileError: a file is missing, or is not what the manifest says.
    """
    manifest = read_json(folder / MANIFEST_FILE, dict[str, str])
    shards = {name for name in manifest if fnmatch(name, SHARDS)}
    files = sorted(SMALL_FILES | shards if shards else FILES)
    if missing := [name for name in files if name not in manifest]:
        raise DamagedFileError(Problem(f"{MANIFEST_FILE} lacks {', '.join(missing)}"))

    def is_whole(name: str) -> bool:
        with reading(folder / name):
            return sha256(folder / name) == manifest[name]

    whole = world().shared_out(files, is_whole)
    if damaged := [name for name, is_so in zip(files, whole, strict=True) if not is_so]:
        raise DamagedFileError(Problem(f"{', '.join(damaged)} changed since it was written"))
