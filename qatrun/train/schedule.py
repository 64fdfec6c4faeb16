"""What a step does, as pure functions of the step: the phase and the learning rate. A resume lands where it left."""

from __future__ import annotations

import math

from qatrun.quant import Mode
from qatrun.recipe import TrainConfig, WarmupConfig


def mode_at(step: int, *, switch_step: int, observed_steps: int, quantizes: bool) -> Mode:
    """What the quantizers do in optimizer step `step` (counted from 0).

    Args:
        switch_step: the first step with fake quantization (of an arm), or the branch point (of a trunk).
        observed_steps: steps before the switch in which amax is recorded, so that it finds a full history.
        quantizes: False in a trunk, which records for its arms and never quantizes.
    """
    if step >= switch_step and quantizes:
        return Mode.QUANTIZE
    return Mode.OBSERVE if step >= switch_step - observed_steps else Mode.OFF


def learning_rate_at(step: int, train: TrainConfig, warmup: WarmupConfig) -> float:
    """Learning rate of optimizer step `step` (counted from 0): a linear rise over `lr_warmup_steps`, then the schedule
    down towards `min_lr_ratio` of the peak, which the step after the last would have. A BF16 phase with a learning rate
    of its own holds it."""
    rise = min(1.0, (step + 1) / train.lr_warmup_steps) if train.lr_warmup_steps else 1.0
    if warmup.learning_rate is not None and step < warmup.steps:
        return warmup.learning_rate * rise
    span = max(1, train.steps - train.lr_warmup_steps)
    progress = min(1.0, max(0.0, (step - train.lr_warmup_steps) / span))
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return train.learning_rate * rise * (train.min_lr_ratio + (1 - train.min_lr_ratio) * shape[train.lr_schedule])
