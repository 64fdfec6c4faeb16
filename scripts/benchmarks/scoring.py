"""Scoring: log-likelihoods of a batch with quantizers on (frozen, as the artifact is scored) and off."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.arms import (
    SHAPES,
    UNQUANTIZED,
    Shape,
    arm_names,
    build_model,
    quantize_model,
    token_ids,
    trainee,
)
from benchmarks.timing import Progress, Row, Settings, interleave, rows_against
from qatrun.numerics import bfloat16_products
from qatrun.quant import freeze


def benchmark(settings: Settings, progress: Progress) -> list[Row]:
    """A case for each compute dtype; the models' weights are in it, as in the artifact."""
    rows = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if settings.device == "cuda" and name == "fp32":
            continue
        shape, rounds = SHAPES[settings.model], 6 if settings.quick else 20
        arms = [
            arm for arm in arm_names() if not (settings.quick and arm.startswith("torchao")) and arm != "hif8_codes"
        ]
        contestants = {arm: _scorer(arm, shape, dtype, settings.device) for arm in arms}
        for run in contestants.values():
            run()
        progress.begin(f"eval {name}", rounds)
        seconds = interleave(contestants, rounds, settings.device, progress)
        rows += rows_against(UNQUANTIZED, seconds, "eval", name)
    return rows


def _scorer(arm: str, shape: Shape, dtype: torch.dtype, device: str) -> Callable[[], object]:
    if arm == UNQUANTIZED or arm.startswith("torchao"):
        model: nn.Module = build_model(shape, device, dtype)
        quantize_model(model, arm)
    else:
        model = trainee(arm, shape, device, bf16=dtype == torch.bfloat16).stepper.model
        freeze(model, dtype)
    return partial(_log_likelihoods, model.eval(), token_ids(shape, device))


@torch.no_grad()  # as lm-eval does
def _log_likelihoods(model: nn.Module, ids: Tensor) -> Tensor:
    """[batch] log-likelihood of each sequence, the softmax in float32."""
    with bfloat16_products():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    scores: Tensor = (chosen - logits.logsumexp(-1)).sum(-1)
    return scores
