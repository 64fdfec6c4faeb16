"""Checkpoints that are whole or not there.

    checkpoints/step-000500/
      model.safetensors       parameters
      optimizer.safetensors   AdamW's moments and step, by parameter name
      state.safetensors       random number generators, amax history and scales
      progress.json           step, position in the data, counters, what run it belongs to
      manifest.json           SHA-256 of each of the files above

A checkpoint is written into a temporary folder, flushed to disk and renamed. The manifest is checked before a checkpoint
is used, so a damaged one is found out and the one before it taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qatrun.errors import CheckpointError

MANIFEST = "manifest.json"
INCOMPLETE = ".incomplete"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on bit for bit.

    Attributes:
        model: parameter name -> tensor, tied ones once.
        optimizer: "<moment>/<parameter name>" -> tensor.
        state: "rng/..." and "quant/..." -> tensor.
        progress: plain data; has "step", the number of optimizer steps done.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    progress: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.progress["step"])

    def quant_tensors(self) -> dict[str, Tensor]:
        """Tensors of the scale state; empty where no quantizers were attached."""
        return {name.removeprefix("quant/"): t for name, t in self.state.items() if name.startswith("quant/")}


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Write `folder/step-NNNNNN` atomically, then drop all but the newest `keep_last` up to it. Later ones are dropped
    too: they are damaged, else the run would have gone on from them."""
    target = folder / f"step-{checkpoint.step:06d}"
    temporary = folder / INCOMPLETE
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ("model", "optimizer", "state"):
        tensors = {key: value.contiguous() for key, value in getattr(checkpoint, name).items()}
        save_file(tensors, temporary / f"{name}.safetensors")
    (temporary / "progress.json").write_text(json.dumps(checkpoint.progress), encoding="utf-8")
    manifest = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for file in temporary.iterdir():
        _flush_to_disk(file)
    _flush_to_disk(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    _flush_to_disk(folder)
    there = _checkpoint_folders(folder)
    kept = there[: there.index(target) + 1][-keep_last:]
    for old in set(there) - set(kept):
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint in a folder, and a sentence on each newer one that is damaged."""
    warnings: list[str] = []
    for candidate in reversed(_checkpoint_folders(folder)):
        try:
            return read_checkpoint(candidate), warnings
        except CheckpointError as error:
            warnings.append(f"{error}; going back to the checkpoint before it")
    return None, warnings


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint whose files are what its manifest says.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        damaged = [name for name, digest in manifest.items() if _sha256(folder / name) != digest]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {error}") from error
    if damaged:
        raise CheckpointError(f"checkpoint {folder} is damaged: {', '.join(damaged)} changed since it was written")
    model, optimizer, state = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer", "state"))
    return Checkpoint(model, optimizer, state, json.loads((folder / "progress.json").read_text(encoding="utf-8")))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        optimizer.state[parameters[name]][entry] = value.to(parameters[name].device)


def rng_tensors() -> dict[str, Tensor]:
    """States of torch's random number generators, CPU and GPUs."""
    states = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"rng/cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Put back what `rng_tensors` gave, as far as the devices are here."""
    torch.set_rng_state(tensors["rng/cpu"])
    for i in range(torch.cuda.device_count()):
        if f"rng/cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng/cuda{i}"], i)


def _checkpoint_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
