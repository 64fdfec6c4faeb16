"""Scales over time: the stacked state against the delayed-scaling formulas, one tensor at a time."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import logits, quantized_steps, tiny_llama, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qatrun import QatConfig
from qatrun.quant import (
    FakeQuantLinear,
    Mode,
    Quantizer,
    QuantPlan,
    QuantState,
    ResumableState,
    attach,
    detach,
    make_plan,
)
from qatrun.recipe import RoleConfig, RoleScaling, ScalingConfig
from qatrun.scheme import Slot

INF, NAN = math.inf, math.nan
SLOTS = (Slot("a", "input"), Slot("a", "weight"), Slot("a", "grad_output"))
QAT = QatConfig(
    format="fp8_e4m3",
    scaling=ScalingConfig(window=3, update_interval=2),
    grad_output=RoleConfig(format="fp8_e5m2"),
)


@dataclass
class Reference:
    """Delayed scaling of one tensor, written out with plain numbers.

    Source: the update rule of Transformer Engine's DelayedScaling recipe, scale inverted to the size of a grid unit.
    """

    scaling: ScalingConfig
    target: float
    history: list[float] = field(default_factory=list)
    scale: np.float32 = np.float32(1)  # noqa: RUF009
    num_pushes: int = 0
    primed: bool = False

    def update_scale(self) -> None:
        estimate = self.history[0]
        if self.scaling.algorithm == "max":
            estimate = NAN if any(map(math.isnan, self.history)) else max(self.history)
        if math.isfinite(estimate) and estimate > 0:
            self.scale = np.float32(np.float64(estimate) / self.target)

    def push(self, amax: float, quantizing: bool) -> None:
        self.history = [amax, *self.history][: self.scaling.window]
        self.num_pushes += 1
        if quantizing and not self.primed:
            self.begin()
        elif quantizing and self.scaling.type == "delayed" and self.num_pushes % self.scaling.update_interval == 0:
            self.update_scale()

    def begin(self) -> None:
        if self.num_pushes:
            self.primed = True
            if self.scaling.type != "none":
                self.update_scale()


def plan_of(qat: QatConfig, num_linears: int = 1) -> QuantPlan:
    """Quantizers of linears a, b, ... that read a tensor each."""
    names = tuple("abcdefghijklmnopqrstuvwxyz"[i % 26] * (1 + i // 26) for i in range(num_linears))
    return QuantPlan(dict.fromkeys(names, qat.schemes), {name: name for name in names})


def one_slot(**scaling: Any) -> QuantState:
    """A state whose slot 0 has these settings, in QUANTIZE before any history."""
    state = QuantState(plan_of(QatConfig(format="int8", scaling=ScalingConfig(**scaling))))
    state.enter(Mode.QUANTIZE)
    return state


def push(state: QuantState, *amaxes: float, slot: int = 0) -> float:
    """Observe micro-batches, push, and return the slot's scale times its target: the amax it stands for."""
    for amax in amaxes:
        state.scales.observe(slot, torch.tensor(amax))
    state.push()
    return float(state.scales.scale[slot] * state.scales.target[slot])


amaxes = st.one_of(
    st.sampled_from([0.0, INF, NAN]),
    st.floats(2.0**-60, 2.0**60, width=32),
)
scalings = st.builds(
    ScalingConfig,
    type=st.sampled_from(["delayed", "delayed", "dynamic", "static", "none"]),
    algorithm=st.sampled_from(["max", "most_recent"]),
    window=st.integers(1, 5),
    update_interval=st.integers(1, 3),
)


@settings(max_examples=150, deadline=None)
@given(
    roles=st.tuples(scalings, scalings, scalings),
    observed=st.integers(0, 7),
    steps=st.lists(st.tuples(*[st.lists(amaxes, min_size=1, max_size=3)] * 3), min_size=1, max_size=16),
)
def test_scales_are_those_of_the_reference_formulas(
    roles: tuple[ScalingConfig, ...], observed: int, steps: list[tuple[list[float], ...]]
) -> None:
    """Roles of their own windows, algorithms and types; micro-batches; a switch after some observed steps."""
    of_input, of_weight, of_gradient = (RoleConfig(scaling=RoleScaling(**s.model_dump())) for s in roles)
    qat = QatConfig(format="fp8_e5m2", input=of_input, weight=of_weight, grad_output=of_gradient)
    state = QuantState(plan_of(qat))
    state.enter(Mode.OBSERVE)
    references = {name: Reference(scaling, 57344.0) for name, scaling in zip(SLOTS, roles, strict=True)}
    for number, step in enumerate(steps):
        if number == observed:
            state.enter(Mode.QUANTIZE)
            for reference in references.values():
                reference.begin()
        for (name, reference), micro_batches in zip(references.items(), step, strict=True):
            for amax in micro_batches:
                state.scales.observe(state.scales.index[name], torch.tensor(amax))
            raised = NAN if any(map(math.isnan, micro_batches)) else max(micro_batches)
            reference.push(raised, quantizing=number >= observed)
        state.push()
        for name, reference in references.items():
            scale, inverse = (float(t[state.scales.index[name]]) for t in (state.scales.scale, state.scales.inv_scale))
            assert scale == float(reference.scale), (name, number)
            assert inverse == float(np.float32(1 / np.float64(reference.scale))), (name, number)


class CountedOperations(TorchDispatchMode):
    """Counts what is dispatched while it is on."""

    def __enter__(self) -> CountedOperations:
        self.count = 0
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_push_takes_as_many_operations_for_64_linears_as_for_8() -> None:
    counts = []
    for num_linears in (8, 64):
        state = QuantState(plan_of(QatConfig(grad_output=RoleConfig()), num_linears))
        assert state.scales.history.shape == (64, 3 * num_linears)
        state.enter(Mode.QUANTIZE)
        state.push()
        with CountedOperations() as operations:
            state.push()
        counts.append(operations.count)
    assert counts[0] == counts[1] > 0


# The known bugs of other implementations.


def test_an_old_amax_leaves_the_window() -> None:
    state = one_slot(window=3)
    assert push(state, 127.0 * 8) == 127.0 * 8
    assert [push(state, 127.0) for _ in range(3)] == [127.0 * 8, 127.0 * 8, 127.0]


def test_windows_are_each_role_its_own() -> None:
    short, long = RoleConfig(scaling=RoleScaling(window=1)), RoleConfig(scaling=RoleScaling(window=4))
    state = QuantState(plan_of(QatConfig(format="int8", input=short, weight=long)))
    state.enter(Mode.QUANTIZE)
    for amax in (127.0 * 4, 127.0, 127.0, 127.0, 127.0):
        state.scales.observe(0, torch.tensor(amax))
        estimates = push(state, amax, slot=1), float(state.scales.scale[0] * 127)
        assert estimates[1] == amax
    assert estimates == (127.0, 127.0)
    assert state.scales.history[:, 1].tolist() == [127.0] * 4


def test_every_micro_batch_of_a_step_counts() -> None:
    for step in ((508.0, 127.0, 254.0), (127.0, 508.0), (127.0, 254.0, 508.0)):
        state = one_slot(algorithm="most_recent", window=1)
        assert push(state, *step) == 508.0
        assert push(state, 127.0) == 127.0  # and no longer than this step


def test_an_amax_that_tells_nothing_keeps_the_scale() -> None:
    state = one_slot(algorithm="most_recent")
    push(state, 254.0)
    for amax in (0.0, INF, NAN):
        assert push(state, amax) == 254.0
        assert push(state, amax, 127.0) == (127.0 if amax == 0 else 254.0)
        push(state, 254.0)


def test_the_interval_counts_pushes() -> None:
    state = one_slot(algorithm="most_recent", update_interval=3)
    estimates = [push(state, 127.0 * n) / 127 for n in range(1, 8)]
    assert estimates == [1, 1, 3, 3, 3, 6, 6]  # a cold start, then every third push


def test_static_scales_stay_where_the_switch_found_them() -> None:
    state = QuantState(plan_of(QatConfig(format="int8", scaling=ScalingConfig(type="static", window=2))))
    state.enter(Mode.OBSERVE)
    for amax in (127.0 * 8, 127.0 * 2, 127.0):
        push(state, amax)
    state.enter(Mode.QUANTIZE)
    assert float(state.scales.scale[0]) == 2.0
    assert push(state, 127.0 * 64) == 127.0 * 2


def num_saturated(state: QuantState, qat: QatConfig, *amaxes: float) -> int:
    """Slots that saturate while inputs of these amaxes are quantized, one after the other, and a push ends the unit."""
    quantizer = Quantizer(SLOTS[0], qat.schemes["input"], state)
    for amax in amaxes:
        quantizer.on_grid(torch.tensor([0.1, -amax]), torch.float32)
    state.push()
    saturated = int(state.tally.num_saturated())
    state.tally.take()
    assert int(state.tally.num_saturated()) == 0
    return saturated


def test_saturated_slots_are_counted_once_and_only_beyond_the_edge() -> None:
    qat = QatConfig(format="int8", scaling=ScalingConfig(algorithm="most_recent"))
    state = QuantState(plan_of(qat))
    state.enter(Mode.QUANTIZE)
    assert num_saturated(state, qat, 1.0) == 0
    for amaxes, saturates in (((1.0,), 0), ((1.01, 1.02), 1), ((0.5,), 0), ((0.51,), 1), ((INF,), 1)):
        assert num_saturated(state, qat, *amaxes) == saturates, amaxes


def test_a_dynamic_scale_never_saturates() -> None:
    qat = QatConfig(format="int8", scaling=ScalingConfig(type="dynamic"))
    state = QuantState(plan_of(qat))
    state.enter(Mode.QUANTIZE)
    assert [num_saturated(state, qat, amax) for amax in (1.0, 100.0)] == [0, 0]


def test_hif8_saturates_at_its_own_edge_or_at_the_target() -> None:
    for clip, edge in (("format", 2.0**15 / 15), ("target", 1.0)):
        for beyond, saturates in ((0.99, 0), (1.3, 1)):
            qat = QatConfig(format="hif8", clip=clip)
            state = QuantState(plan_of(qat))
            state.enter(Mode.QUANTIZE)
            assert num_saturated(state, qat, 1.0) == 0
            assert num_saturated(state, qat, edge * beyond) == saturates, (clip, beyond)


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


def test_an_arm_adopts_the_columns_and_rows_that_it_needs() -> None:
    trunk_plan = plan_of(QatConfig(format="int8", scaling=ScalingConfig(window=4), grad_output=RoleConfig()), 3)
    trunk = QuantState(trunk_plan)
    trunk.enter(Mode.OBSERVE)
    for step in range(1, 6):
        for (name, role), slot in trunk.scales.index.items():
            trunk.scales.observe(slot, torch.tensor(127.0 * step * (1 + len(role) + ord(name))))
        trunk.push()
    wanted = QatConfig(format="int8", scaling=ScalingConfig(window=2))
    arm = QuantState(QuantPlan(dict.fromkeys(("c", "a"), wanted.schemes), {"c": "b", "a": "a"}))
    ResumableState(arm).adopt(ResumableState(trunk).state_dict())
    for slot, index in arm.scales.index.items():
        of_trunk = trunk.scales.history[:2, trunk.scales.index[slot]]
        assert arm.scales.history[:, index].tolist() == of_trunk.tolist()
    arm.enter(Mode.QUANTIZE)
    newest = [trunk.scales.history[0, trunk.scales.index[slot]] for slot in arm.scales.index]
    assert torch.equal(arm.scales.scale, torch.stack(newest) / 127)


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
