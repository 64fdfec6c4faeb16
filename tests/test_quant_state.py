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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qatrun import QatConfig
from qatrun.quant import FakeQuantLinear, Mode, QuantPlan, ScaleState, attach, detach, make_plan
from qatrun.recipe import RoleConfig, RoleScaling, ScalingConfig

INF, NAN = math.inf, math.nan
SLOTS = ("a:input", "a:weight", "a:grad_output")
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
    return QuantPlan(names, {name: name for name in names}, {spec.role: spec for spec in qat.roles})


def one_slot(**scaling: Any) -> ScaleState:
    """A state whose slot 0 has these settings, in QUANTIZE before any history."""
    state = ScaleState(plan_of(QatConfig(format="int8", scaling=ScalingConfig(**scaling))))
    state.begin_quantizing()
    return state


def push(state: ScaleState, *amaxes: float, slot: int = 0) -> float:
    """Observe micro-batches, push, and return the slot's scale times its target: the amax it stands for."""
    for amax in amaxes:
        state.observe(slot, torch.tensor(amax))
    state.push()
    return float(state.scale[slot] * state.target[slot])


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
    state = ScaleState(plan_of(qat))
    state.mode = Mode.OBSERVE
    references = {name: Reference(scaling, 57344.0) for name, scaling in zip(SLOTS, roles, strict=True)}
    for number, step in enumerate(steps):
        if number == observed:
            state.begin_quantizing()
            for reference in references.values():
                reference.begin()
        for (name, reference), micro_batches in zip(references.items(), step, strict=True):
            for amax in micro_batches:
                state.observe(state.index[name], torch.tensor(amax))
            raised = NAN if any(map(math.isnan, micro_batches)) else max(micro_batches)
            reference.push(raised, quantizing=number >= observed)
        state.push()
        for name, reference in references.items():
            scale, inverse = (float(t[state.index[name]]) for t in (state.scale, state.inv_scale))
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
        state = ScaleState(plan_of(QatConfig(grad_output=RoleConfig()), num_linears))
        assert state.history.shape == (64, 3 * num_linears)
        state.begin_quantizing()
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
    state = ScaleState(plan_of(QatConfig(format="int8", input=short, weight=long)))
    state.begin_quantizing()
    for amax in (127.0 * 4, 127.0, 127.0, 127.0, 127.0):
        state.observe(0, torch.tensor(amax))
        estimates = push(state, amax, slot=1), float(state.scale[0] * 127)
        assert estimates[1] == amax
    assert estimates == (127.0, 127.0)
    assert state.history[:, 1].tolist() == [127.0] * 4


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
    state = ScaleState(plan_of(QatConfig(format="int8", scaling=ScalingConfig(type="static", window=2))))
    state.mode = Mode.OBSERVE
    for amax in (127.0 * 8, 127.0 * 2, 127.0):
        push(state, amax)
    state.begin_quantizing()
    assert float(state.scale[0]) == 2.0
    assert push(state, 127.0 * 64) == 127.0 * 2


def test_saturated_slots_are_counted_once_and_only_beyond_the_edge() -> None:
    state = one_slot(algorithm="most_recent")
    push(state, 1.0)
    state.take_num_saturated()
    for amax, saturates in ((1.0, 0), (1.01, 1), (0.5, 0), (0.51, 1), (INF, 1)):
        push(state, amax)
        assert int(state.take_num_saturated()) == saturates, amax
        assert int(state.take_num_saturated()) == 0


def test_a_dynamic_scale_never_saturates() -> None:
    state = one_slot(type="dynamic")
    for amax in (1.0, 100.0):
        push(state, amax)
        assert int(state.take_num_saturated()) == 0


def test_hif8_saturates_at_its_own_edge_or_at_the_target() -> None:
    for clip, beyond in (("format", 2.0**15 / 15 * 1.01), ("target", 1.01)):
        plan = plan_of(QatConfig(format="hif8"))
        state = ScaleState(QuantPlan(plan.linears, plan.input_group, plan.roles, clip))
        state.begin_quantizing()
        push(state, 1.0)
        push(state, beyond * 0.98)
        assert int(state.take_num_saturated()) == 0, clip
        state.observe(0, state.scale[0] * (15 if clip == "target" else 2**15) * 1.01)
        state.push()
        assert int(state.take_num_saturated()) == 1, clip


def observed_step(model: Any, seed: int) -> None:
    tokens = token_ids(seed=seed)
    model(input_ids=tokens, labels=tokens).loss.backward()


def through_files(state: ScaleState, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    save_file(state.tensors(), folder / "state.safetensors")
    return load_file(folder / "state.safetensors"), json.loads(json.dumps(state.counters()))


def test_a_resume_has_the_amax_state_that_was_saved(tmp_path: Path) -> None:
    """Saved between two micro-batches, read back into a new model: the same history and scales from there on."""
    model = tiny_llama()
    state = attach(model, make_plan(model, QAT))
    quantized_steps(model, state, num_steps=4, learning_rate=0.0)
    observed_step(model, seed=10)
    resumed = tiny_llama()
    resumed_state = attach(resumed, make_plan(resumed, QAT))
    resumed_state.restore(*through_files(state, tmp_path))
    assert float(resumed_state.amax.max()) > 0
    for this_model, this_state in ((model, state), (resumed.train(), resumed_state)):
        observed_step(this_model, seed=11)
        this_state.push()
        quantized_steps(this_model, this_state, num_steps=2, learning_rate=0.0)
    assert_same_state(resumed_state, state)
    assert torch.equal(logits(resumed), logits(model))


def test_a_resume_does_not_turn_fake_quantization_on_early(tmp_path: Path) -> None:
    model = tiny_llama().train()
    state = attach(model, make_plan(model, QAT))
    state.mode = Mode.OBSERVE
    for step in range(2):
        observed_step(model, seed=step)
        state.push()
    resumed = tiny_llama().train()
    resumed_state = attach(resumed, make_plan(resumed, QAT))
    resumed_state.restore(*through_files(state, tmp_path))
    assert resumed_state.mode is Mode.OBSERVE
    assert not resumed_state.primed
    assert torch.equal(logits(resumed), logits(tiny_llama()))
    resumed_state.begin_quantizing()
    assert resumed_state.primed
    assert not torch.equal(logits(resumed), logits(tiny_llama()))


def test_an_arm_adopts_the_columns_and_rows_that_it_needs() -> None:
    trunk_plan = plan_of(QatConfig(format="int8", scaling=ScalingConfig(window=4), grad_output=RoleConfig()), 3)
    trunk = ScaleState(trunk_plan)
    trunk.mode = Mode.OBSERVE
    for step in range(1, 6):
        for name, slot in trunk.index.items():
            trunk.observe(slot, torch.tensor(127.0 * step * (1 + len(name) + ord(name[0]))))
        trunk.push()
    wanted = QatConfig(format="int8", scaling=ScalingConfig(window=2))
    arm = ScaleState(QuantPlan(("c", "a"), {"c": "b", "a": "a"}, {spec.role: spec for spec in wanted.roles}))
    arm.adopt_history(trunk.tensors(), trunk.counters())
    for name, slot in arm.index.items():
        assert arm.history[:, slot].tolist() == trunk.history[:2, trunk.index[name]].tolist()
    arm.begin_quantizing()
    newest = [trunk.history[0, trunk.index[name]] for name in arm.names]
    assert torch.equal(arm.scale, torch.stack(newest) / 127)


def test_fake_quantization_never_falls_back_to_the_plain_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    state = attach(model, make_plan(model, QatConfig(grad_output=RoleConfig())))
    state.begin_quantizing()

    def fail(*_: Any) -> None:
        raise AssertionError("the plain linear was called")

    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            monkeypatch.setattr(module.original, "forward", fail)
    observed_step(model.train(), seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        observed_step(model, seed=1)
        logits(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    observed_step(model.train(), seed=2)
    logits(copy.deepcopy(model))
    assert (state.amax > 0).all()  # every input, weight and output gradient was seen


# What must not move the state.


def states_after(model: Any, state: ScaleState) -> Iterator[ScaleState]:
    """The state after each of two steps of observing and three of quantizing."""
    model.train()
    state.mode = Mode.OBSERVE
    for step in range(5):
        if step == 2:
            state.begin_quantizing()
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
    state.mode = mode
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
    assert state.scale.dtype == state.history.dtype == torch.float32
    assert_same_state(state, before)
    detach(model)
    assert_same_state(state, before)


def assert_same_state(one: ScaleState, other: ScaleState) -> None:
    assert one.counters() == other.counters()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name
