"""What quantizers saw of their tensors: the counts and energies behind the statistics of a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qatrun.quant.scales import Scales
from qatrun.ranks import World

# Columns of `Tally.take`.
STATISTICS = ("amax", "scale", "overshoot", "clip_fraction", "underflow_fraction", "sqnr_db")


class Tally:
    """Of every slot, since it was taken last. A tensor saturates where the kernels count values that hit an edge; nothing
    else judges it.

    Attributes:
        counts: [num_slots, 2] int64: values clipped and flushed to zero, of `num_values`.
        energies: [num_slots, 2] float64: of signal and quantization noise, while `measures_noise`.
        amax, overshoot: [num_slots] float32: the largest amax, and amax over what the scale stood for.
        scale: [num_slots] float32, the last in use.
    """

    amax: Tensor
    overshoot: Tensor
    scale: Tensor
    counts: Tensor
    energies: Tensor
    num_values: Any  # list of int; [num_slots] int64 once it is shared

    def __init__(self, num_slots: int) -> None:
        self.measures_noise = False
        self._clear(num_slots, torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """Move to another device."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def count(self, slot: int, counts: Tensor, num_values: int) -> None:
        """Add clipped and underflowed values ([2] int64), of so many."""
        self.counts[slot] += counts
        self.num_values[slot] += num_values

    @torch.no_grad()
    def measure_noise(self, slot: int, x: Tensor, x_hat: Tensor) -> None:
        """Add a tensor and its quantized self, of one shape, to signal and noise."""
        signal, noise = x.float().square().sum(), (x.float() - x_hat).square().sum()
        self.energies[slot] += torch.stack([signal, noise]).double()

    @torch.no_grad()
    def note_amax(self, amax: Tensor) -> None:
        """Keep the amaxes, [num_slots, or more], of a unit of history that ends."""
        self.amax = torch.maximum(self.amax, amax[: len(self.amax)])

    @torch.no_grad()
    def note_fit(self, scales: Scales, *, primed: bool) -> None:
        """Keep how well the scales of a unit that ends fitted what they scaled."""
        self.scale, overshoot = scales.used(primed=primed)
        self.overshoot = torch.fmax(self.overshoot, overshoot)

    def share(self, world: World) -> None:
        """Add up what all processes of a world have counted since it was taken last; once before it is taken again. Amax,
        overshoot and scale are the same on all of them (see `QuantState.push`)."""
        if world.size == 1:
            return
        num_values = torch.as_tensor(self.num_values, dtype=torch.float64).to(self.counts.device)
        parts = [self.counts.double(), num_values.unsqueeze(1), self.energies]
        counts, of_values, self.energies = world.total(torch.cat(parts, dim=1)).split([2, 1, 2], dim=1)
        self.counts, self.num_values = counts.long(), of_values.flatten().long()

    def num_saturated(self) -> Tensor:
        """[] int64: slots that clipped any value."""
        return (self.counts[:, 0] > 0).sum()

    @torch.no_grad()
    def take(self) -> Tensor:
        """[num_slots, len(STATISTICS)] float32, NaN where nothing was measured; begins anew."""
        num_values = torch.as_tensor(self.num_values, dtype=torch.float32).to(self.counts.device)
        fractions = self.counts / num_values.unsqueeze(1)  # 0 / 0: nothing was quantized
        signal, noise = self.energies.unbind(1)
        columns = [self.amax, self.scale, self.overshoot, *fractions.unbind(1), 10 * (signal / noise).log10()]
        self._clear(len(self.counts), self.counts.device)
        return torch.stack([column.float() for column in columns], dim=1)

    def _clear(self, num_slots: int, device: torch.device) -> None:
        self.num_values = [0] * num_slots
        self.counts = torch.zeros(num_slots, 2, dtype=torch.int64, device=device)
        self.energies = torch.zeros(num_slots, 2, dtype=torch.float64, device=device)
        self.amax = torch.zeros(num_slots, device=device)
        self.overshoot = torch.full((num_slots,), math.nan, device=device)
        self.scale = torch.full((num_slots,), math.nan, device=device)
