"""The scales of all quantized tensors of a model, and the amax history that they are made from.

Delayed tensor scaling (DTS) gives the scale of a step from amaxes seen before it:

    history  <- [amax of this step; history without its oldest row]
    estimate  = a rule of `scheme.RULES` over the window
    scale     = estimate / target_amax        rounded up to a power of two where the scheme says so; kept as it was where
                                              the estimate is zero, Inf or NaN

An asymmetric slot has columns of history besides, of how far its tensors reach below zero and above it; scale and zero-point
come from both (see `numerics.affine_from_reach`), by the same rule.

These are the semantics of Transformer Engine's delayed scaling. All slots live in `[window, num_slots]` and `[num_slots]`
tensors, so a push is the same few operations however many layers there are. Forward and backward only ever raise `amax`, by
a maximum: what activation checkpointing recomputes changes nothing, and every micro-batch counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qatrun.numerics import Fit, affine_from_reach, inverse_scale, scale_from_amax
from qatrun.scheme import RULES, Scheme, Slot

_NEXT_TO_ZERO = 2.0**-126  # the smallest normal number


def takes_own_scale(slot: Slot, scheme: Scheme, *, primed: bool, training: bool) -> bool:
    """Whether a tensor's scale comes from itself: one of rows always, a dynamic one while training (a weight's also when
    frozen: it does not depend on the batch), and any that is scaled while no scale comes from a history yet."""
    if scheme.per_row or (scheme.scaling.type == "dynamic" and (training or slot.role == "weight")):
        return True
    return scheme.scaling.type != "none" and not primed


class Scales:
    """amax history and scales of every slot of a plan.

    Attributes:
        names: of the slots, in the order of all that is kept for them.
        index: slot -> its place in that order.
        columns: of history: the amax of each slot, then how far each asymmetric one reaches below zero and above it.
        history: [window, num_columns] float32, newest row first; 0 where nothing was seen.
        amax: [num_columns] float32, the largest seen since the last push.
        scale, inv_scale: [num_slots] float32; units of the tensor per unit of the grid, and the reciprocal.
        zero: [num_slots] float32, zero-points; 0 where it is symmetric.
        target: [num_slots] float32, the grid values that amax is mapped to.
        unit: what a push closes, the same for all slots.
        num_pushes: rows that history has had.
        num_changes: how often history or scales have moved.
    """

    def __init__(self, slots: Mapping[Slot, Scheme], observed_as: Mapping[Slot, Slot]) -> None:
        schemes, num = list(slots.values()), len(slots)
        kinds = [scheme.scaling for scheme in schemes]
        self.names = tuple(str(slot) for slot in slots)
        self.index: Mapping[Slot, int] = {slot: i for i, slot in enumerate(slots)}
        ranged = [slot for slot, scheme in slots.items() if not scheme.symmetric]
        self._sides = {self.index[slot]: slice(num + 2 * i, num + 2 * i + 2) for i, slot in enumerate(ranged)}
        self._ranged = torch.tensor(list(self._sides), dtype=torch.int64)
        self.columns, self._observed_as = (
            [*map(str, of.values()), *(f"{of[slot]}{side}" for slot in ranged for side in ("<0", ">0"))]
            for of in ({slot: slot for slot in slots}, observed_as)
        )
        self.unit = kinds[0].unit
        self.num_pushes = self.num_changes = 0
        self.amax = torch.zeros(len(self.columns))
        self.history = torch.zeros(max(kind.window for kind in kinds), len(self.columns))
        self.scale, self.inv_scale, self.zero = torch.ones(num), torch.ones(num), torch.zeros(num)
        self.target = torch.tensor([scheme.target_amax for scheme in schemes])
        self.delayed = torch.tensor([kind.type == "delayed" for kind in kinds])
        self.dynamic = torch.tensor([kind.type == "dynamic" for kind in kinds])
        self.to_power_of_two = torch.tensor([kind.to_power_of_two for kind in kinds])
        self.scaled = torch.tensor([kind.type != "none" for kind in kinds])
        self._interval = torch.tensor([kind.update_interval for kind in kinds])
        self._own_scale = torch.tensor(
            [
                [takes_own_scale(slot, scheme, primed=primed, training=True) for slot, scheme in slots.items()]
                for primed in (False, True)
            ]
        )
        self._rules = tuple(dict.fromkeys(kinds))  # few, however many slots
        kinds += [slots[slot].scaling for slot in ranged for _ in range(2)]
        self._follows = torch.tensor([[kind == rule for kind in kinds] for rule in self._rules])

    def to(self, device: torch.device) -> None:
        """Move to another device, never to another dtype: scale arithmetic is float32 always."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    @torch.no_grad()
    def observe(self, slot: int, amax: Tensor, reach: Tensor | None = None) -> None:
        """Raise a slot's amax since the last push to at least this one ([] float32, NaN stays visible); of an asymmetric
        one, too, how far it reaches below zero and above it ([2] float32)."""
        seen = self.amax[slot]
        torch.maximum(seen, amax, out=seen)
        if reach is not None:  # where it has no value on a side, that is not nothing seen
            seen = self.amax[self._sides[slot]]
            torch.maximum(seen, torch.maximum(reach, amax.clamp(max=_NEXT_TO_ZERO)), out=seen)

    def fit(self, slot: int) -> Fit:
        """What a slot's tensors are scaled with now."""
        return self.scale[slot], self.inv_scale[slot], self.zero[slot] if slot in self._sides else None

    @torch.no_grad()
    def push(self) -> None:
        """Make what was seen since the last push the newest row of history."""
        self.history = torch.cat([self.amax.unsqueeze(0), self.history[:-1]])
        self.amax = torch.zeros_like(self.amax)
        self.num_pushes += 1
        self.num_changes += 1

    def due(self) -> Tensor:
        """[num_slots] bool: delayed slots whose interval ends with this push."""
        return self.delayed & (self.num_pushes % self._interval == 0)

    @torch.no_grad()
    def move(self, which: Tensor) -> None:
        """Renew the scales of some slots, [num_slots] bool, from the history."""
        scale, zero = self._fitting(self._estimate())
        self.scale, self.zero = torch.where(which, scale, self.scale), torch.where(which, zero, self.zero)
        self.inv_scale = inverse_scale(self.scale)
        self.num_changes += 1

    @torch.no_grad()
    def multiply(self, factors: Tensor) -> None:
        """Multiply the scales, [num_slots], and the history that says them, alike; zero-points stay."""
        sides = [factors[index].expand(2) for index in self._sides]
        self.history = self.history * torch.cat([factors, *sides])
        self.scale = self.scale * factors
        self.inv_scale = inverse_scale(self.scale)
        self.num_changes += 1

    def used(self, *, primed: bool) -> tuple[Tensor, Tensor]:
        """(scale, overshoot), [num_slots] float32: what the tensors seen since the last push were quantized with, and their
        amax over what that stands for, of an asymmetric slot on the side that goes further past its edge. Where tensors
        have scales of their own, both are of the largest."""
        own, (scale, zero) = self._own_scale[int(primed)], self._fitting(self.amax)
        scale, zero = torch.where(own, scale, self.scale), torch.where(own, zero, self.zero)
        overshoot = self.amax[: len(scale)] / (scale * self.target)
        if self._sides:
            edges = torch.stack([128.5 + zero, 127.5 - zero])[:, self._ranged] * scale[self._ranged]
            overshoot = overshoot.index_copy(0, self._ranged, (self._reach(self.amax) / edges).amax(0))
        return scale, overshoot

    def forget(self) -> None:
        """Begin a new history."""
        self.history, self.amax = torch.zeros_like(self.history), torch.zeros_like(self.amax)
        self.num_pushes = 0

    def adopt(self, columns: list[str], history: Tensor, num_pushes: int) -> None:
        """Take the amax history that another state, a trunk's, observed, in columns of these names."""
        theirs = {name: i for i, name in enumerate(columns)}
        wanted = torch.tensor([theirs[name] for name in self._observed_as])
        self.history = history[: len(self.history), wanted].to(self.history.device)
        self.num_pushes = num_pushes

    def _fitting(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero-point), [num_slots], for what was seen, [num_columns]; as they are where that tells nothing."""
        scale, zero = scale_from_amax(seen[: len(self.scale)], self.target, self.scale, self.to_power_of_two), self.zero
        if self._sides:
            ranged = affine_from_reach(
                self._reach(seen), self.scale[self._ranged], zero[self._ranged], self.to_power_of_two[self._ranged]
            )
            scale, zero = (of.index_copy(0, self._ranged, new) for of, new in zip((scale, zero), ranged, strict=True))
        return scale, zero

    def _reach(self, seen: Tensor) -> Tensor:
        """[2, num_asymmetric] of [num_columns]"""
        return seen[len(self.scale) :].view(-1, 2).t()

    def _estimate(self) -> Tensor:
        """[num_columns] estimates, each slot's by its own rule."""
        estimate = self.history[0]
        for scaling, follows in zip(self._rules, self._follows, strict=True):
            estimate = torch.where(follows, RULES[scaling.algorithm](self.history, scaling), estimate)
        return estimate
