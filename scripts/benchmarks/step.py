"""One training step: forward, backward, fused AdamW and, for qatrun, the scale update."""

from __future__ import annotations

from benchmarks.arms import SHAPES, UNQUANTIZED, arm_names, trainee
from benchmarks.timing import Progress, Row, Settings, interleave, rows_against


def benchmark(settings: Settings, progress: Progress) -> list[Row]:
    """fp32, and bf16 autocast over fp32 master weights; on a GPU bf16 with and without gradient checkpointing."""
    if settings.device == "cuda":
        return _case("bf16", True, False, settings, progress) + _case("bf16 ckpt", True, True, settings, progress)
    return _case("fp32", False, False, settings, progress) + _case("bf16", True, False, settings, progress)


def _case(name: str, bf16: bool, checkpointing: bool, settings: Settings, progress: Progress) -> list[Row]:
    rounds = 4 if settings.quick else 15
    others = [arm for arm in arm_names() if arm != UNQUANTIZED and not (settings.quick and arm.startswith("torchao"))]
    # All in one round where memory permits; a GPU holds the reference and one more.
    groups = [others] if settings.device == "cpu" else [[arm] for arm in others]
    rows: dict[str, Row] = {}
    for group in groups:
        progress.begin(f"step {name}", rounds)
        arms = {
            arm: trainee(arm, SHAPES[settings.model], settings.device, bf16=bf16, checkpointing=checkpointing)
            for arm in (UNQUANTIZED, *group)
        }
        seconds = interleave({arm: made.step for arm, made in arms.items()}, rounds, settings.device, progress)
        rows |= {row.key: row for row in rows_against(UNQUANTIZED, seconds, "step", name)}
    return list(rows.values())
