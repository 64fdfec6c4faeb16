"""Models that a diagnosis needs beside those of the study: weights of an arm or of its twin, with scales calibrated on
training text instead of carried along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qatrun.layout import ArmFolder
from qatrun.model import DTYPES, load_model, on_device
from qatrun.numerics import bfloat16_products
from qatrun.quant import QuantPlan, attach, calibrate
from qatrun.recipe import Arm
from qatrun.train.checkpoint import fill, latest_checkpoint


def calibrated(arm: Arm, folder: ArmFolder, plan: QuantPlan, batches: Sequence[Tensor]) -> Any:
    """The trained weights of a folder under a plan, quantizing, with the scale of each tensor from these batches. Where a
    scale is a channel's or a token's own, nothing is calibrated.

    Args:
        folder: the arm's, or its twin's; its last checkpoint's master weights, else the exported ones.
        batches: [batch, seq_len] token ids each.
    """
    model = on_device(_trained(arm, folder)).eval()
    attach(model, plan)
    device, compute = next(model.parameters()).device, DTYPES[arm.model.compute_dtype]
    enabled = arm.model.compute_dtype != arm.model.param_dtype
    with torch.autocast(device.type, dtype=compute, enabled=enabled), bfloat16_products():
        calibrate(model, [batch.to(device) for batch in batches])
    return model


def _trained(arm: Arm, folder: ArmFolder) -> Any:
    checkpoint, _ = latest_checkpoint(folder.checkpoints)
    if checkpoint is None or checkpoint.folder is None:
        plain = arm.model.model_copy(update={"path": str(folder.path), "revision": None})
        return load_model(plain, DTYPES[arm.model.param_dtype])
    model = load_model(arm.model, DTYPES[arm.model.param_dtype])
    fill(checkpoint.folder, {"model": dict(model.named_parameters())})
    return model
