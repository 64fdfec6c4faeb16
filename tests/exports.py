"""Small quantized arms to be exported, and exports of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders import quantized_steps, tiny_llama, word_tokenizer

from qatrun import QatConfig
from qatrun.export import artifact
from qatrun.quant import attach, freeze, make_plan
from qatrun.recipe import RoleConfig, ScalingConfig

POWERS = ScalingConfig(rounding="power_of_two")
CHANNEL, TOKEN = RoleConfig(granularity="per_channel"), RoleConfig(granularity="per_token")


def mixed(**scaling: Any) -> QatConfig:
    """FP8 attention, INT8 gate and up, the rest in BF16."""
    int8 = {"match": ["*.gate_proj", "*.up_proj"], "format": "int8", "weight": {"granularity": "per_channel"}}
    return QatConfig.model_validate(
        {"format": "fp8_e4m3", "targets": ["*.self_attn.*"], "modules": [int8], "scaling": scaling}
    )


ARMS: dict[str, Any] = {
    "fp8, a scale a tensor": QatConfig(format="fp8_e4m3"),
    "fp8, channels": QatConfig(format="fp8_e4m3", weight=CHANNEL),
    "fp8, channels and tokens": QatConfig(format="fp8_e4m3", weight=CHANNEL, input=TOKEN),
    "int8, a scale a tensor": QatConfig(format="int8"),
    "int8, channels": QatConfig(format="int8", weight=CHANNEL),
    "int8, channels and tokens": QatConfig(format="int8", weight=CHANNEL, input=TOKEN),
    "int8, asymmetric inputs": QatConfig(format="int8", weight=CHANNEL, input=RoleConfig(symmetric=False)),
    "mixed": mixed(),
}
EXACT: dict[str, Any] = {
    "fp8": QatConfig(format="fp8_e4m3", scaling=POWERS),
    "int8": QatConfig(format="int8", weight=CHANNEL, scaling=POWERS),
    "mixed": mixed(rounding="power_of_two"),
}


def frozen_arm(
    folder: Path, wanted: Any, dtype: torch.dtype = torch.float32, build: Any = None, **settings: Any
) -> tuple[Path, Any, Any]:
    """(an arm's folder with the quantized one in it, the frozen model, its plan), after a few steps."""
    model = (build or tiny_llama)(**settings)
    plan = make_plan(model, wanted)
    quantized_steps(model, attach(model, plan))
    freeze(model, dtype)
    artifact.save(model, word_tokenizer(), plan, folder / artifact.FOLDER)
    return folder, model, plan
