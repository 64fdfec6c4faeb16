"""Scales over time: the stacked state against the delayed-scaling formulas, one tensor at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qatrun import QatConfig
from qatrun.quant import (
    Mode,
    Quantizer,
    QuantPlan,
    QuantState,
    ResumableState,
)
from qatrun.recipe import RoleConfig, RoleScaling, ScalingConfig
from qatrun.scheme import Slot

INF, NAN = math.inf, math.nan
SLOTS = (Slot("a", "input"), Slot("a", "weight"), Slot("a", "grad_output"))


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
            if self.scaling.rounding == "power_of_two":
                self.scale = np.float32(2.0 ** math.ceil(math.log2(self.scale)))

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
    rounding=st.sampled_from(["none", "power_of_two"]),
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
