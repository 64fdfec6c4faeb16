"""Memory: what autograd keeps for the backward, and the most that is in use during a step."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.arms import SHAPES, UNQUANTIZED, WATCHED, Trainee, arm_names, trainee
from benchmarks.timing import Progress, Row, Settings, counted
from benchmarks.worker import in_new_process


def benchmark(settings: Settings, progress: Progress) -> list[Row]:
    """bf16 (and fp32 on a CPU; checkpointed on a GPU), bytes saved and peak, relative to the unquantized model."""
    cases = [("bf16", True, False)]
    if settings.device == "cuda":
        cases.append(("bf16 ckpt", True, True))
    elif not settings.quick:
        cases.append(("fp32", False, False))
    rows = []
    for name, bf16, checkpointing in cases:
        arms = [arm for arm in arm_names() if arm != WATCHED]
        progress.begin(f"memory {name}", 2 * len(arms))
        saved, peak = {}, {}
        for arm in arms:
            made = trainee(arm, SHAPES[settings.model], settings.device, bf16=bf16, checkpointing=checkpointing)
            saved[arm] = float(saved_for_backward(made))
            del made
            progress.advance()
            peak[arm] = peak_memory(settings, arm, bf16=bf16, checkpointing=checkpointing)
            progress.advance()
        rows += _rows("saved", name, saved) + _rows("peak", name, peak)
    return rows


def saved_for_backward(made: Trainee) -> int:
    """Bytes that a forward saves for its backward: every storage once, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in made.model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # alive until the backward, so that no address is used twice

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = made.forward()
    loss.backward()
    made.optimizer.zero_grad(set_to_none=True)
    return sum(storages.values())


def peak_memory(settings: Settings, arm: str, *, bf16: bool, checkpointing: bool) -> float:
    """Bytes, in a process of its own."""
    return in_new_process(
        "peak",
        arm=arm,
        shape=SHAPES[settings.model],
        device=settings.device,
        bf16=bf16,
        checkpointing=checkpointing,
        micro_batches=1,
    )["bytes"]


def _rows(what: str, case: str, measured: dict[str, float]) -> list[Row]:
    base = measured[UNQUANTIZED]
    return [
        counted(
            "memory",
            f"{what} {case}",
            arm,
            value / base,
            reference=UNQUANTIZED,
            absolute=value / 2**20,
            absolute_unit="MiB",
        )
        for arm, value in measured.items()
    ]
