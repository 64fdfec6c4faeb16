"""Models that are made without training: weights of the start model, of an arm or of its twin, with scales from calibration
on training text. An arm with `method: ptq` is one, and a diagnosis compares with others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qatrun.data import open_data
from qatrun.layout import START, ArmFolder
from qatrun.model import DTYPES, load_model, on_device
from qatrun.numerics import bfloat16_products
from qatrun.quant import QuantPlan, attach, calibrate, find_folds, folded, smooth
from qatrun.recipe import Arm, CalibrationConfig
from qatrun.tokenizer import load_tokenizer
from qatrun.train.checkpoint import fill, latest_checkpoint


def calibrated(arm: Arm, folder: ArmFolder, plan: QuantPlan, batches: Sequence[Tensor], how: CalibrationConfig) -> Any:
    """The weights of a folder under a plan, quantizing, with the scale of each tensor from these batches. Where a scale is a
    channel's or a token's own, nothing is calibrated.

    Args:
        folder: the arm's, or its twin's: its last checkpoint's master weights, else the exported ones; or the start
            model's, which is the pretrained model.
        batches: [batch, seq_len] token ids each.
    """
    model = on_device(_weights(arm, folder)).eval()
    with computing_as(arm, model):
        on_it = [batch.to(next(model.parameters()).device) for batch in batches]
        if how.smooth is not None:
            smooth(model, folded(find_folds(model), plan.schemes), on_it, how.smooth)
        attach(model, plan)
        calibrate(model, on_it, least_error=how.input == "mse")
    return model


def calibration_batches(arm: Arm, sequences: int) -> tuple[Tensor, ...]:
    """The first so many training sequences, [batch, seq_len] token ids each."""
    data = open_data(arm.data, load_tokenizer(arm.model), arm.train.seed)
    batches: tuple[Tensor, ...] = data.train.take(sequences).input_ids.split(arm.train.micro_batch_size)
    return batches


@contextmanager
def computing_as(arm: Arm, model: Any) -> Iterator[None]:
    """In the dtype that the arm computes in."""
    device, compute = next(model.parameters()).device, DTYPES[arm.model.compute_dtype]
    enabled = arm.model.compute_dtype != arm.model.param_dtype
    with torch.autocast(device.type, dtype=compute, enabled=enabled), bfloat16_products():
        yield


def _weights(arm: Arm, folder: ArmFolder) -> Any:
    dtype = DTYPES[arm.model.param_dtype]
    if folder.path.name == START:
        return load_model(arm.model, dtype)
    checkpoint, _ = latest_checkpoint(folder.checkpoints)
    if checkpoint is None or checkpoint.folder is None:
        plain = arm.model.model_copy(update={"path": str(folder.path), "revision": None})
        return load_model(plain, dtype)
    model = load_model(arm.model, dtype)
    fill(checkpoint.folder, {"model": dict(model.named_parameters())})
    return model
