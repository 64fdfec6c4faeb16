"""Memory: what autograd keeps for the backward, and the most that is in use during a step."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.arms import SHAPES, UNQUANTIZED, Trainee, arm_names, trainee
from benchmarks.timing import Progress, Row, Settings, row_of
from benchmarks.worker import in_new_process


def benchmark(settings: Settings, progress: Progress) -> list[Row]:
    """In bf16 (on a GPU checkpointed too), bytes saved and peak, relative to the unquantized model."""
    cases = [("bf16", False)] + ([("bf16 ckpt", True)] if settings.device == "cuda" else [])
    processes = 1 if settings.quick else 3  # what the allocator holds differs a little from start to start
    rows = []
    for name, checkpointing in cases:
        arms = arm_names()
        progress.begin(f"memory {name}", len(arms) * (1 + processes))
        saved: dict[str, list[float]] = {}
        peak: dict[str, list[float]] = {arm: [] for arm in arms}
        for arm in arms:
            made = trainee(arm, SHAPES[settings.model], settings.device, bf16=True, checkpointing=checkpointing)
            saved[arm] = [float(saved_for_backward(made))]
            del made
            progress.advance()
        for arm in arms * processes:
            peak[arm].append(peak_memory(settings, arm, checkpointing=checkpointing))
            progress.advance()
        rows += _rows("saved", name, saved) + _rows("peak", name, peak)
    return rows


def saved_for_backward(made: Trainee) -> int:
    """Bytes that a forward saves for its backward: every storage once, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in made.stepper.model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # alive until the backward, so that no address is used twice

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = made.forward()
    loss.backward()
    made.stepper.optimizer.zero_grad(set_to_none=True)
    return sum(storages.values())


def peak_memory(settings: Settings, arm: str, *, checkpointing: bool) -> float:
    """Bytes, in a process of its own, in bf16."""
    shape, device = SHAPES[settings.model], settings.device
    arguments: dict[str, Any] = {"arm": arm, "shape": shape, "device": device, "checkpointing": checkpointing}
    return in_new_process("peak", bf16=True, micro_batches=1, **arguments)["bytes"]


def _rows(what: str, case: str, measured: dict[str, list[float]]) -> list[Row]:
    base = np.asarray(measured[UNQUANTIZED])
    return [
        row_of(
            np.asarray(values) / base,
            "memory",
            f"{what} {case}",
            arm,
            reference=UNQUANTIZED,
            absolute=float(np.median(values)) / 2**20,
            absolute_unit="MiB",
        )
        for arm, values in measured.items()
    ]
