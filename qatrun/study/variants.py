"""Models that a diagnosis needs beside those of the study: weights of an arm or of its twin, with scales calibrated on
training text instead of carried along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qatrun.data import open_data
from qatrun.model import DTYPES, load_model, on_device
from qatrun.numerics import bfloat16_products
from qatrun.quant import QuantPlan, attach, calibrate
from qatrun.recipe import Arm, ScalingConfig
from qatrun.study.layout import ArmFolder
from qatrun.train import latest_checkpoint

CALIBRATED = ScalingConfig(type="delayed", algorithm="max", window=1)
Histogram = dict[str, Any]

LOG2_BINS = torch.arange(-24.0, 16.25, 0.25)  # of |x| in units of the grid; HiF8 reaches from 2^-22 to 2^15


def calibrated(arm: Arm, folder: ArmFolder, plan: QuantPlan, batches: Sequence[Tensor]) -> Any:
    """The trained weights of a folder under an arm's plan, quantizing, with the scale of each tensor from these batches.
    Where a scale is a channel's or a token's own, nothing is calibrated.

    Args:
        folder: the arm's, or its twin's; its last checkpoint's master weights, else the exported ones.
    """
    model = on_device(_trained(arm, folder)).eval()
    attach(model, calibrated_plan(plan))
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=DTYPES[arm.model.compute_dtype], enabled=_autocasts(arm))
    with autocast, bfloat16_products():
        calibrate(model, [batch.to(device) for batch in batches])
    return model


def calibration_batches(arm: Arm, tokenizer: Any, count: int) -> list[Tensor]:
    """The first `count` training sequences, [batch, seq_len] each."""
    sequences = open_data(arm.data, tokenizer, arm.train.seed).train.take(count).input_ids
    return list(sequences.split(arm.train.micro_batch_size))


@torch.no_grad()
def input_histograms(model: Any, input_ids: Tensor, scales: Mapping[str, float], plan: QuantPlan) -> list[Histogram]:
    """How |x| / scale of some inputs is spread over the grid, in bins of log2.

    Args:
        model: with quantizers attached.
        input_ids: [num, seq_len].
        scales: linear -> scale of its input, units of the tensor per unit of the grid.
    """
    counts: dict[str, Tensor] = {}
    zeros: dict[str, int] = {}

    def count(name: str, x: Tensor) -> None:
        size = (x.detach().float().abs() / scales[name]).cpu()
        counts[name] = torch.histogram(size[size > 0].log2().clamp(LOG2_BINS[0], LOG2_BINS[-1]), LOG2_BINS).hist
        zeros[name] = int((size == 0).sum())

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: count(name, args[0]))
        for name in scales
    ]
    try:
        model(input_ids=input_ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    spec = plan.roles["input"]
    return [
        {
            "tensor": f"{name}:input",
            "format": spec.format,
            "scale": scales[name],
            "target_amax": spec.target_amax,
            "log2_edges": LOG2_BINS.tolist(),
            "counts": [int(value) for value in found],
            "num_zero": zeros[name],
            "num_values": int(found.sum()) + zeros[name],
        }
        for name, found in counts.items()
    ]


def _trained(arm: Arm, folder: ArmFolder) -> Any:
    checkpoint, _ = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        plain = arm.model.model_copy(update={"path": str(folder.path), "revision": None})
        return load_model(plain, DTYPES[arm.model.param_dtype])
    model = load_model(arm.model, DTYPES[arm.model.param_dtype])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.model[name])
    return model


def calibrated_plan(plan: QuantPlan) -> QuantPlan:
    """The plan with every scale of a whole tensor from calibration, whatever its own scaling."""
    roles = {
        role: replace(spec, scaling=CALIBRATED) if spec.granularity == "per_tensor" else spec
        for role, spec in plan.roles.items()
    }
    return replace(plan, roles=roles, saved_activations="values")


def _autocasts(arm: Arm) -> bool:
    return arm.model.compute_dtype != arm.model.param_dtype
