"""A few optimizer steps of a tiny model with quantizers on, and all that must come out the same."""

from __future__ import annotations

from typing import Any

import torch
from builders import tiny_llama, token_ids
from torch import Tensor

from qatrun.quant import Mode, QuantState, ResumableState, attach, make_plan
from qatrun.recipe import QatConfig

NUM_STEPS, MICRO_BATCHES = 3, 2

SETTINGS: dict[str, dict[str, Any]] = {
    "hif8": {},
    "gradients too": {"grad_output": {}},
    "int8 clipped at the target": {"format": "int8", "clip": "target", "grad_output": {}},
    "a push a micro-batch": {"scaling": {"unit": "microbatch", "window": 2}},
    "per channel and token": {
        "format": "fp8_e4m3",
        "weight": {"granularity": "per_channel"},
        "input": {"granularity": "per_token"},
    },
    "dynamic": {"scaling": {"type": "dynamic"}},
    "asymmetric": {"format": "int8", "input": {"symmetric": False}},
    "asymmetric by token": {"format": "int8", "input": {"symmetric": False, "granularity": "per_token"}},
    "no mask": {"format": "fp8_e5m2", "ste": "identity"},
}


def attached(make_model: Any = tiny_llama, **qat: Any) -> tuple[Any, QuantState]:
    """A model in training mode that quantizes from its first step."""
    model = make_model().train()
    state = attach(model, make_plan(model, QatConfig(**qat)))
    state.enter(Mode.QUANTIZE)
    return model, state


def trained(model: Any, state: QuantState) -> dict[str, Tensor]:
    """Losses, weights and scale state after a few optimizer steps of two micro-batches each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    losses = []
    for step in range(NUM_STEPS):
        for micro in range(MICRO_BATCHES):
            tokens = token_ids(seed=MICRO_BATCHES * step + micro)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            losses.append(loss.detach())
            if state.scales.unit == "microbatch":
                state.push()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if state.scales.unit == "optimizer_step":
            state.push()
    scales = {key: value for key, value in ResumableState(state).state_dict().items() if isinstance(value, Tensor)}
    return {"losses": torch.stack(losses)} | dict(model.named_parameters()) | scales


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert one["losses"].isfinite().all()
