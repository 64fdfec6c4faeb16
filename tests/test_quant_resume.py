"""What a resume gives back of the quantizers' state, and what must not move it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import logits, quantized_steps, tiny_llama, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qatrun import QatConfig
from qatrun.quant import (
    FakeQuantLinear,
    Mode,
    QuantState,
    ResumableState,
    attach,
    detach,
    make_plan,
)
from qatrun.recipe import RoleConfig, ScalingConfig

QAT = QatConfig(
    format="fp8_e4m3",
    scaling=ScalingConfig(window=3, update_interval=2),
    grad_output=RoleConfig(format="fp8_e5m2"),
)


def observed_step(model: Any, seed: int) -> None:
    tokens = token_ids(seed=seed)
    model(input_ids=tokens, labels=tokens).loss.backward()


def through_files(state: QuantState, folder: Path) -> dict[str, Any]:
    saved = ResumableState(state).state_dict()
    save_file({key: value for key, value in saved.items() if isinstance(value, Tensor)}, folder / "state.safetensors")
    plain = {key: value for key, value in saved.items() if not isinstance(value, Tensor)}
    return load_file(folder / "state.safetensors") | json.loads(json.dumps(plain))


def test_a_resume_has_the_amax_state_that_was_saved(tmp_path: Path) -> None:
    """Saved between two micro-batches, read back into a new model: the same history and scales from there on."""
    model = tiny_llama()
    state = attach(model, make_plan(model, QAT))
    quantized_steps(model, state, num_steps=4, learning_rate=0.0)
    observed_step(model, seed=10)
    resumed = tiny_llama()
    resumed_state = attach(resumed, make_plan(resumed, QAT))
    ResumableState(resumed_state).load_state_dict(through_files(state, tmp_path))
    assert float(resumed_state.scales.amax.max()) > 0
    for this_model, this_state in ((model, state), (resumed.train(), resumed_state)):
        observed_step(this_model, seed=11)
        this_state.push()
        quantized_steps(this_model, this_state, num_steps=2, learning_rate=0.0)
    assert_same_state(resumed_state, state)
    assert torch.equal(logits(resumed), logits(model))


def test_a_resume_does_not_turn_fake_quantization_on_early(tmp_path: Path) -> None:
    model = tiny_llama().train()
    state = attach(model, make_plan(model, QAT))
    state.enter(Mode.OBSERVE)
    for step in range(2):
        observed_step(model, seed=step)
        state.push()
    resumed = tiny_llama().train()
    resumed_state = attach(resumed, make_plan(resumed, QAT))
    ResumableState(resumed_state).load_state_dict(through_files(state, tmp_path))
    assert resumed_state.mode is Mode.OBSERVE
    assert not resumed_state.primed
    assert torch.equal(logits(resumed), logits(tiny_llama()))
    resumed_state.enter(Mode.QUANTIZE)
    assert resumed_state.primed
    assert not torch.equal(logits(resumed), logits(tiny_llama()))


def test_fake_quantization_never_falls_back_to_the_plain_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    state = attach(model, make_plan(model, QatConfig(grad_output=RoleConfig())))
    state.enter(Mode.QUANTIZE)

    plain_forward = nn.Linear.forward

    def only_of_others(module: nn.Linear, x: Tensor) -> Tensor:
        assert not isinstance(module, FakeQuantLinear), "the plain linear was called"
        return plain_forward(module, x)

    monkeypatch.setattr(nn.Linear, "forward", only_of_others)
    observed_step(model.train(), seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        observed_step(model, seed=1)
        logits(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    observed_step(model.train(), seed=2)
    logits(copy.deepcopy(model))
    assert (state.scales.amax > 0).all()  # every input, weight and output gradient was seen


# What must not move the state.


def states_after(model: Any, state: QuantState) -> Iterator[QuantState]:
    """The state after each of two steps of observing and three of quantizing."""
    model.train()
    state.enter(Mode.OBSERVE)
    for step in range(5):
        if step == 2:
            state.enter(Mode.QUANTIZE)
        observed_step(model, seed=step)
        state.push()
        yield copy.deepcopy(state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_by_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    plain, checkpointed = tiny_llama(), tiny_llama()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()  # the reentrant kind needs an input with a gradient
    pairs = [(model, attach(model, make_plan(model, QAT))) for model in (plain, checkpointed)]
    for without, with_ in zip(*(states_after(*pair) for pair in pairs), strict=True):
        assert_same_state(with_, without)
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model, _ in pairs]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("mode", [Mode.OBSERVE, Mode.QUANTIZE])
def test_nothing_moves_in_eval(mode: Mode) -> None:
    model = tiny_llama()
    state = attach(model, make_plan(model, QAT))
    quantized_steps(model, state, num_steps=2)
    state.enter(mode)
    before = copy.deepcopy(state)
    model.eval()
    logits(model, token_ids(seed=3))
    observed_step(model, seed=4)  # with gradients, and still in eval
    assert_same_state(state, before)


def test_detaching_or_casting_the_model_leaves_the_state_in_float32() -> None:
    model = tiny_llama()
    state = attach(model, make_plan(model, QAT))
    quantized_steps(model, state)
    before = copy.deepcopy(state)
    model.to(torch.bfloat16).half().double().float()
    assert state.scales.scale.dtype == state.scales.history.dtype == torch.float32
    assert_same_state(state, before)
    detach(model)
    assert_same_state(state, before)


def assert_same_state(one: QuantState, other: QuantState) -> None:
    theirs = ResumableState(other).state_dict()
    for name, value in ResumableState(one).state_dict().items():
        same = torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
        assert same, name
