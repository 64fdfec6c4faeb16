"""One training step, the loop's own: forward, backward, clipping, fused AdamW and, for qatrun, the scale update."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.arms import SHAPES, UNQUANTIZED, arm_names, trainee
from benchmarks.timing import Progress, Row, Settings, interleave, rows_against

COMPILED_ARMS = ("hif8", "torchao_fp8", "torchao_int8")


@dataclass(frozen=True)
class _Case:
    name: str
    bf16: bool
    checkpointing: bool = False
    compiled: bool = False


def benchmark(settings: Settings, progress: Progress) -> list[Row]:
    """bf16 autocast over fp32 master weights, and fp32 (on a GPU: bf16 with gradient checkpointing), as it is and with
    the whole model under torch.compile, which torchao counts on. Quick: without torchao and torch.compile."""
    cases = [_Case("fp32", bf16=False), _Case("bf16", bf16=True)]
    if settings.device == "cuda":
        cases = [_Case("bf16", bf16=True), _Case("bf16 ckpt", bf16=True, checkpointing=True)]
    rows = [row for case in cases for row in _run(case, settings, progress)]
    if settings.device == "cpu":
        rows += _dtypes(settings, progress)
    if not settings.quick:
        for case in cases:
            if not case.checkpointing:
                rows += _run(_Case(f"{case.name} compiled", case.bf16, compiled=True), settings, progress)
    return rows


def _dtypes(settings: Settings, progress: Progress) -> list[Row]:
    """The unquantized step in bf16 beside that in fp32: what a CPU without a unit for bfloat16 pays."""
    rounds = 4 if settings.quick else 20
    progress.begin("step, unquantized", rounds)
    arms = {
        name: trainee(UNQUANTIZED, SHAPES[settings.model], settings.device, bf16=name == "bf16")
        for name in ("fp32", "bf16")
    }
    seconds = interleave({name: made.step for name, made in arms.items()}, rounds, settings.device, progress)
    return rows_against("fp32", seconds, "step", "unquantized")


def _run(case: _Case, settings: Settings, progress: Progress) -> list[Row]:
    torch.compiler.reset()
    arms = [arm for arm in arm_names() if arm in COMPILED_ARMS or not case.compiled]
    ours = [arm for arm in arms if not arm.startswith("torchao") and arm != UNQUANTIZED]
    groups = [(ours, 4)] if settings.quick else [(ours, 20), ([arm for arm in arms if arm.startswith("torchao")], 5)]
    if settings.device == "cuda":  # room for two at a time
        groups = [([arm], rounds) for group, rounds in groups for arm in group]
    rows: dict[str, Row] = {}
    for group, rounds in groups:
        if group:
            rows = {row.key: row for row in _against_unquantized(group, rounds, case, settings, progress)} | rows
    return sorted(rows.values(), key=lambda row: arm_names().index(row.arm))


def _against_unquantized(
    group: list[str], rounds: int, case: _Case, settings: Settings, progress: Progress
) -> list[Row]:
    progress.begin(f"step {case.name}", rounds)
    shape = SHAPES[settings.model]
    arms = {
        arm: trainee(
            arm,
            shape,
            settings.device,
            bf16=case.bf16,
            checkpointing=case.checkpointing,
            compiled=case.compiled,
        )
        for arm in (UNQUANTIZED, *group)
    }
    seconds = interleave({arm: made.step for arm, made in arms.items()}, rounds, settings.device, progress)
    return rows_against(UNQUANTIZED, seconds, "step", case.name)
