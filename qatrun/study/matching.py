"""In what an arm and its BF16 twin must agree, so that nothing but quantization can tell them apart."""

from __future__ import annotations

from typing import Any

from qatrun.recipe import Arm
from qatrun.study.segments import BOOKKEEPING


def matched_settings(arm: Arm) -> dict[str, Any]:
    """What an arm's training must have in common with its twin's, besides the data consumed: all that decides where
    training without quantization would end."""
    return {
        "model": arm.model.model_dump(mode="json"),
        **arm.train.model_dump(mode="json", exclude={"micro_batch_size", "gradient_checkpointing", *BOOKKEEPING}),
        "warmup": arm.warmup.model_dump(mode="json"),
    }
