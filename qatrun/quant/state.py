"""The state of a model's quantizers: what phase they are in, their scales, and what they saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import nn

from qatrun.quant.plan import QuantPlan
from qatrun.quant.scales import Scales
from qatrun.quant.tally import Tally
from qatrun.ranks import world


class Mode(Enum):
    """What attached linears do."""

    OFF = "off"  # compute as before attach
    OBSERVE = "observe"  # compute as before attach, and record amax
    QUANTIZE = "quantize"  # fake-quantize, and record amax while training


class QuantState(nn.Module):
    """Registered on the model, so that it follows it to a device and into a deep copy; holds no parameter and no buffer, so
    that the model's `state_dict` stays as it is.

    Nobody but this class writes the phase, and forward and backward move neither history nor scales.

    Attributes:
        mode: what the attached linears do now.
        primed: whether scales come from a history. Until the first push in QUANTIZE they come from the tensor at hand.
        keeps_grids: whether a weight on its grid is kept from its first forward in a step to its last backward. Where the
            weights themselves are there only while a layer computes (FSDP2), it is made anew for each of them.
        last_micro_batch: whether the weights change after the backward at hand, so that each weight's grid can be let go
            as soon as its gradient is there. Who does not set it pays memory, not correctness.
    """

    def __init__(self, plan: QuantPlan) -> None:
        super().__init__()
        self.scales = Scales(plan.slots(), plan.observed_as())
        self.tally = Tally(len(self.scales.names))
        self.mode = Mode.OFF
        self.primed = False
        self.keeps_grids = True
        self.last_micro_batch = False

    def enter(self, mode: Mode) -> None:
        """Change what linears do. Where a history was observed before, the first step that quantizes has its scales from
        it."""
        self.mode = mode
        if mode is Mode.QUANTIZE and not self.primed and self.scales.num_pushes:
            self._prime()

    @contextmanager
    def computing(self, mode: Mode) -> Iterator[None]:
        """Another mode for as long as the block lasts; scales stay as they are."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def push(self) -> None:
        """Close one unit of history (an optimizer step or a micro-batch) and move the scales that are due. In a world of
        several processes all come here, and go on with the same scales."""
        self.scales.amax = world().maximum(self.scales.amax)
        self.tally.note_amax(self.scales.amax)
        if self.mode is Mode.QUANTIZE:
            self.tally.note_fit(self.scales, primed=self.primed)
        self.scales.push()
        if self.mode is Mode.QUANTIZE and self.primed:
            self.scales.move(self.scales.due())
        elif self.mode is Mode.QUANTIZE:
            self._prime()

    def forget(self) -> None:
        """Begin a new history, and take scales from the tensors at hand until there is one."""
        self.scales.forget()
        self.primed = False

    def generation(self) -> tuple[int, int, bool]:
        """Changes whenever a scale may have, or amax must be seen anew."""
        return self.scales.num_changes, self.scales.scale._version, self.training

    def calibrate_dynamic(self) -> None:
        """Give dynamic per-tensor slots the scale of the last window, so that scores do not depend on the batch."""
        self.scales.move(self.scales.dynamic)

    def _prime(self) -> None:
        self.scales.move(self.scales.scaled)
        self.primed = True

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantState:
        device = fn(torch.empty(0, device=self.scales.scale.device)).device
        if device.type != "meta":
            self.scales.to(device)
            self.tally.to(device)
        return self


class ResumableState:
    """A model's `QuantState` as a part of a checkpoint: a module's own `state_dict` is the model's."""

    def __init__(self, state: QuantState) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        """History, scales and phase."""
        scales = self._state.scales
        tensors = {name: getattr(scales, name) for name in _TENSORS}
        phase = {"primed": self._state.primed, "mode": self._state.mode.value}
        return {**tensors, **phase, "names": list(scales.columns), "num_pushes": scales.num_pushes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become exactly the state that was checkpointed under the same plan."""
        scales = self._state.scales
        for name in state.keys() & _TENSORS:  # zero-points came later than checkpoints
            setattr(scales, name, state[name].to(scales.scale.device))
        scales.num_pushes = state["num_pushes"]
        scales.num_changes += 1
        self._state.primed, self._state.mode = state["primed"], Mode(state["mode"])

    def adopt(self, state: Mapping[str, Any]) -> None:
        """Take the amax history of the slots that a trunk observed."""
        self._state.scales.adopt(state["names"], state["history"], state["num_pushes"])


_TENSORS = ("history", "amax", "scale", "inv_scale", "zero")
