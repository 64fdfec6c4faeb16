"""Scales: one stacked state for all quantized tensors of a model.

A *slot* is one quantized tensor (an input, a weight, an output gradient). Delayed tensor scaling (DTS) gives the scale
of a step from amaxes seen before it:

    history  <- [amax of this step; history without its oldest row]
    estimate  = max over the window, or the newest row (`most_recent`), or their moving average (`ema`)
    scale     = estimate / target_amax        kept as it was where the estimate is zero, Inf or NaN

These are the semantics of Transformer Engine's delayed scaling. All slots live in `[window, num_slots]` and
`[num_slots]` buffers, so a push is the same few operations however many layers there are. Forward and backward only ever
raise `amax`, by a maximum: what activation checkpointing recomputes changes nothing, and every micro-batch counts. Only
`push`, which the training loop calls, moves history and scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from qatrun.formats import get_format
from qatrun.numerics import inverse_scale, scale_from_amax
from qatrun.quant.plan import QuantPlan

# Columns of `ScaleState.take_statistics`.
STATISTICS = ("amax", "scale", "overshoot", "clip_fraction", "underflow_fraction", "sqnr_db")

# amax * (1 / target) * target may exceed amax by a few units in the last place; that is no saturation.
ROUNDING_SLACK = 1 + 2**-20


class Mode(Enum):
    """What attached linears do."""

    OFF = "off"  # compute as before attach
    OBSERVE = "observe"  # compute as before attach, and record amax
    QUANTIZE = "quantize"  # fake-quantize, and record amax while training


class DeviceOnlyModule(nn.Module):
    """A module whose buffers follow the model to another device, but never to another dtype: scale arithmetic is
    float32 always."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> DeviceOnlyModule:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(torch.empty(0, device=buffer.device)).device)
        return self


class ScaleState(DeviceOnlyModule):
    """amax history and scales of every slot of a plan.

    Attributes:
        history: [window, num_slots] float32, newest row first; 0 where nothing was seen.
        amax: [num_slots] float32, the largest seen since the last push.
        scale, inv_scale: [num_slots] float32; units of the tensor per unit of the grid, and the reciprocal.
        counts: [num_slots, 2] int64: values clipped and flushed to zero since `take_statistics`, of `num_values`.
        energies: [num_slots, 2] float64: of signal and quantization noise since then, while `measures_noise`.
        step_amax, overshoot: [num_slots] float32: the largest amax since then, and amax over what the scale stood for.
        saturated: [num_slots] bool; whether amax went beyond what the scale can represent since `take_num_saturated`.
        mode: what the attached linears do now.
        num_changes: how often history or scales have moved.
        last_micro_batch: whether the weights change after the backward at hand, so that each weight's grid can be let go
            as soon as its gradient is there. Who does not set it pays memory, not correctness.
        primed: whether scales come from a history. Until the first push in QUANTIZE they come from the tensor at hand.
    """

    history: Tensor
    amax: Tensor
    scale: Tensor
    inv_scale: Tensor
    target: Tensor
    edge: Tensor
    in_window: Tensor
    most_recent: Tensor
    ema: Tensor
    ema_weights: Tensor
    saturated: Tensor
    counts: Tensor
    energies: Tensor
    step_amax: Tensor
    overshoot: Tensor
    used_scale: Tensor
    delayed: Tensor
    dynamic: Tensor
    unscaled: Tensor
    interval: Tensor

    def __init__(self, plan: QuantPlan) -> None:
        super().__init__()
        slots = dict(plan.slots())
        scaling = [spec.scaling for spec in slots.values()]
        targets = [spec.target_amax for spec in slots.values()]
        edges = [
            spec.target_amax if plan.clip == "target" else get_format(spec.format).max_finite for spec in slots.values()
        ]
        self.names = tuple(slots)
        self.index: Mapping[str, int] = {name: i for i, name in enumerate(self.names)}
        self.unit = next(iter(slots.values())).scaling.unit
        self.mode = Mode.OFF
        self.primed = False
        self.num_pushes = 0
        self.num_changes = 0
        self.last_micro_batch = False
        self.measures_noise = False
        self.num_values = [0] * len(slots)
        window = max(s.window for s in scaling)
        ages = torch.arange(window).unsqueeze(1)
        constants: dict[str, Tensor] = {
            "history": torch.zeros(window, len(slots)),
            "amax": torch.zeros(len(slots)),
            "scale": torch.ones(len(slots)),
            "inv_scale": torch.ones(len(slots)),
            "target": torch.tensor(targets),
            "edge": torch.tensor(edges),
            "in_window": ages < torch.tensor([s.window for s in scaling]),
            "most_recent": torch.tensor([s.algorithm == "most_recent" for s in scaling]),
            "ema": torch.tensor([s.algorithm == "ema" for s in scaling]),
            "ema_weights": torch.tensor([s.ema_decay for s in scaling]) ** ages,
            "saturated": torch.zeros(len(slots), dtype=torch.bool),
            "counts": torch.zeros(len(slots), 2, dtype=torch.int64),
            "energies": torch.zeros(len(slots), 2, dtype=torch.float64),
            "step_amax": torch.zeros(len(slots)),
            "overshoot": torch.full((len(slots),), math.nan),
            "used_scale": torch.full((len(slots),), math.nan),
            "delayed": torch.tensor([s.type == "delayed" for s in scaling]),
            "dynamic": torch.tensor([s.type == "dynamic" for s in scaling]),
            "unscaled": torch.tensor([s.type == "none" for s in scaling]),
            "interval": torch.tensor([s.update_interval for s in scaling]),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def observe(self, slot: int, amax: Tensor) -> None:
        """Raise a slot's amax since the last push to at least this one ([] float32, NaN stays visible)."""
        with torch.no_grad():
            seen = self.amax[slot]
            torch.maximum(seen, amax, out=seen)

    def count(self, slot: int, counts: Tensor, num_values: int) -> None:
        """Add to a slot's clipped and underflowed values ([2] int64), of so many."""
        self.counts[slot] += counts
        self.num_values[slot] += num_values

    def measure_noise(self, slot: int, x: Tensor, x_hat: Tensor) -> None:
        """Add a tensor and its quantized self, of one shape, to a slot's signal and noise."""
        with torch.no_grad():
            signal, noise = x.float().square().sum(), (x.float() - x_hat).square().sum()
            self.energies[slot] += torch.stack([signal, noise]).double()

    @torch.no_grad()
    def take_statistics(self) -> Tensor:
        """[num_slots, len(STATISTICS)] float32 of what was seen since the last call; NaN where nothing was measured."""
        num_values = torch.tensor(self.num_values, dtype=torch.float32).to(self.counts.device)
        fractions = self.counts / num_values.unsqueeze(1)  # 0 / 0: nothing was quantized
        signal, noise = self.energies.unbind(1)
        columns = [self.step_amax, self.used_scale, self.overshoot, *fractions.unbind(1), 10 * (signal / noise).log10()]
        self.counts, self.energies = torch.zeros_like(self.counts), torch.zeros_like(self.energies)
        self.num_values = [0] * len(self.names)
        self.step_amax = torch.zeros_like(self.step_amax)
        self.overshoot = torch.full_like(self.overshoot, math.nan)
        self.used_scale = torch.full_like(self.used_scale, math.nan)
        return torch.stack([column.float() for column in columns], dim=1)

    @torch.no_grad()
    def push(self) -> None:
        """Close one unit of history (an optimizer step or a micro-batch) and move the scales that are due."""
        self._note_use()
        if self.mode is Mode.QUANTIZE and self.primed:
            self.saturated |= ~self.dynamic & (self.amax > self.scale * self.edge * ROUNDING_SLACK)
        self.history = torch.cat([self.amax.unsqueeze(0), self.history[:-1]])
        self.amax = torch.zeros_like(self.amax)
        self.num_pushes += 1
        self.num_changes += 1
        if self.mode is Mode.QUANTIZE and self.primed:
            self._move_scales(self.delayed & (self.num_pushes % self.interval == 0))
        elif self.mode is Mode.QUANTIZE:
            self._prime()

    def _note_use(self) -> None:
        """Keep for `take_statistics` how well the scales of this unit fitted what they scaled."""
        self.step_amax = torch.maximum(self.step_amax, self.amax)
        if self.mode is Mode.QUANTIZE:
            own = self.dynamic if self.primed else ~self.unscaled  # from the tensor itself
            fitting = scale_from_amax(self.amax, self.target, previous=self.scale)
            self.used_scale = torch.where(own, fitting, self.scale)
            self.overshoot = torch.fmax(self.overshoot, self.amax / (self.used_scale * self.target))

    def begin_quantizing(self) -> None:
        """Switch to QUANTIZE; where a history was observed, the first step already has its scales from it."""
        self.mode = Mode.QUANTIZE
        if self.num_pushes:
            self._prime()

    def generation(self) -> tuple[int, int, bool]:
        """Changes whenever a scale may have, or amax must be seen anew."""
        return self.num_changes, self.scale._version, self.training

    def calibrate_dynamic(self) -> None:
        """Give dynamic per-tensor slots the scale of the last window, so that scores do not depend on the batch."""
        self._move_scales(self.dynamic)

    def take_num_saturated(self) -> Tensor:
        """[] int64: slots that saturated since the last call."""
        count = self.saturated.sum()
        self.saturated = torch.zeros_like(self.saturated)
        return count

    def _prime(self) -> None:
        self._move_scales(~self.unscaled)
        self.primed = True

    def _estimate(self) -> Tensor:
        """[num_slots] amax estimate from each slot's own window: its newest row, its largest, or its mean with weights
        that fall by `ema_decay` a row, over the rows in which anything was seen."""
        windowed = torch.where(self.in_window, self.history, 0.0)
        estimate = torch.where(self.most_recent, self.history[0], windowed.amax(dim=0))
        weights = torch.where(windowed > 0, self.ema_weights, 0.0)
        average = (windowed * weights).sum(dim=0) / weights.sum(dim=0)  # 0 / 0 keeps the scale, as NaN does
        return torch.where(self.ema, average, estimate)

    @torch.no_grad()
    def _move_scales(self, due: Tensor) -> None:
        moved = scale_from_amax(self._estimate(), self.target, previous=self.scale)
        self.scale = torch.where(due, moved, self.scale)
        self.inv_scale = inverse_scale(self.scale)
        self.num_changes += 1

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold; `restore` takes it back with `counters`."""
        return {"history": self.history, "amax": self.amax, "scale": self.scale, "inv_scale": self.inv_scale}

    def counters(self) -> dict[str, Any]:
        """The rest of a checkpoint: slot names and counts, plain data."""
        return {
            "names": list(self.names),
            "num_pushes": self.num_pushes,
            "primed": self.primed,
            "mode": self.mode.value,
        }

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Become exactly the state that was checkpointed under the same plan."""
        for name, value in tensors.items():
            setattr(self, name, value.to(self.scale.device))
        self.num_pushes, self.primed = counters["num_pushes"], counters["primed"]
        self.mode = Mode(counters["mode"])
        self.num_changes += 1

    def adopt_history(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Take the amax history of the slots that another state, a trunk's, observed."""
        theirs = {name: i for i, name in enumerate(counters["names"])}
        columns = torch.tensor([theirs[name] for name in self.names])
        window = self.history.shape[0]
        self.history = tensors["history"][:window, columns].to(self.history.device)
        self.num_pushes = counters["num_pushes"]
