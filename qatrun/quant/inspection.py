"""How the values of every tensor that a linear multiplies are spread, from one pass over some text; and what that says of
scales, before anything is quantized.

The pass keeps a histogram of each tensor, in bins of a sixteenth of an octave for each sign. A bin's values are taken to be
spread evenly in it, so that the error of any scale and zero-point can be found afterwards. What scales of rows would lose is
summed up in the pass, since each row's scale is known there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from qatrun.formats import Role
from qatrun.numerics import Fit, affine_from_reach, inverse_scale, own_fit, scale_from_amax
from qatrun.quant.expert_weights import named_experts
from qatrun.quant.hooks import seeing_inputs
from qatrun.quant.linears import Survey, named_linears
from qatrun.quant.qtensor import to_grid
from qatrun.scheme import ASYMMETRIC_STEPS, Scheme, Slot

STEP = 0.0625
LOG2_EDGES = torch.arange(-40.0, 40.0 + STEP, STEP)  # of |x|; what is smaller or larger is in the first bin or the last
POINTS = 4  # that stand for the values of a bin
SCALES = torch.arange(-6.0, 2.25, 0.25)  # log2 of what a scale is tried at, over that of the amax


@dataclass(frozen=True)
class Spread:
    """Of a tensor's values.

    Attributes:
        low, high: least and largest value, [] float32.
        channels: [num] float32, the amax of each channel: of an input's last dimension, of a weight's rows.
        counts: [2, num_bins] int64, of the values below zero and above it; zeros are in `num_zero`.
        energy, row_noise: [] float64: sum of squares, and of the errors where every row has a scale of its own.
    """

    low: Tensor
    high: Tensor
    channels: Tensor
    counts: Tensor
    num_zero: Tensor
    energy: Tensor
    row_noise: Tensor

    @classmethod
    def of(cls, x: Tensor, by_rows: Scheme, *, channels_are_rows: bool) -> Spread:
        """Of x [..., d]; `by_rows` is how it is quantized with a scale for each row."""
        x = x.detach().flatten(0, -2).float()
        size = x.abs()
        channels = size.amax(1 if channels_are_rows else 0)
        values, num_bins = x[x != 0], len(LOG2_EDGES) - 1
        place = ((values.abs().log2() - LOG2_EDGES[0]) / STEP).floor().clamp(0, num_bins - 1).long()
        counts = torch.bincount(place + num_bins * (values > 0), minlength=2 * num_bins).view(2, num_bins)
        on_grid, _ = to_grid(x, by_rows, own_fit(x, by_rows), torch.float32)
        noise = (x - on_grid.dequantized()).square().sum(dtype=torch.float64)
        energy = x.square().sum(dtype=torch.float64)
        return cls(x.amin(), x.amax(), channels, counts, torch.tensor(x.numel() - values.numel()), energy, noise)

    def and_(self, other: Spread) -> Spread:
        """Both together."""
        return Spread(
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            torch.maximum(self.channels, other.channels),
            self.counts + other.counts,
            self.num_zero + other.num_zero,
            self.energy + other.energy,
            self.row_noise + other.row_noise,
        )

    @property
    def amax(self) -> float:
        return max(abs(float(self.low)), abs(float(self.high)))

    @property
    def num_values(self) -> int:
        return int(self.counts.sum()) + int(self.num_zero)

    @property
    def typical_amax(self) -> float:
        """Of the median channel."""
        return float(self.channels.median())

    @property
    def row_sqnr_db(self) -> float | None:
        """With a scale for each row."""
        return _decibels(self.energy, self.row_noise)

    def sqnr_db(self, scheme: Scheme, fit: Fit, up_to: float = math.inf) -> float | None:
        """With one scale for all, of the values up to that magnitude; None where nothing is lost or nothing is there."""
        points = torch.stack([-_points(), _points()])
        on_grid, _ = to_grid(points.flatten(1), scheme, fit, torch.float32)
        errors = (points.flatten(1) - on_grid.dequantized()).double().square().view(points.shape).mean(-1)
        squares = points.double().square().mean(-1)
        counts = self.counts.cpu() * (LOG2_EDGES[:-1] <= math.log2(up_to))
        return _decibels((counts * squares).sum(), (counts * errors).sum())

    def fit(self, scheme: Scheme, amax: float | None = None) -> Fit:
        """One for all: of its range where the scheme is asymmetric, else of that amax, or its own."""
        if not scheme.symmetric:
            reach = torch.stack([-self.low, self.high]).clamp(min=0).cpu()
            scale, zero = affine_from_reach(reach)
            return scale, inverse_scale(scale), zero
        scale = scale_from_amax(torch.tensor(self.amax if amax is None else amax), scheme.target_amax)
        return scale, inverse_scale(scale), None

    def best_amax(self, scheme: Scheme) -> float:
        """Whose scale loses least: what lies beyond is clipped, or as far as the format goes on past its target."""
        tried = [self.amax * float(factor) for factor in SCALES.exp2()]
        kept = [self.sqnr_db(scheme, self.fit(scheme, amax)) for amax in tried]
        found = zip((-math.inf if decibels is None else decibels for decibels in kept), tried, strict=True)
        return max(found)[1]

    def share_beyond(self, size: float) -> float:
        """Of the values, those larger than that, to the bin."""
        beyond = LOG2_EDGES[:-1] >= math.log2(size) - 1e-6 if size > 0 else torch.ones(len(LOG2_EDGES) - 1).bool()
        return float(self.counts.cpu()[:, beyond].sum()) / max(1, self.num_values)


def asymmetric(scheme: Scheme) -> Scheme | None:
    """The scheme with a zero-point; None where its format has none."""
    other = replace(scheme, symmetric=False, target_amax=ASYMMETRIC_STEPS)
    return other if other.asymmetry_problem("input") is None else None


@torch.no_grad()
def spreads(
    model: Any, seen: Survey, batches: Iterable[Tensor], by_rows: Mapping[Role, Scheme]
) -> Iterable[dict[Slot, Spread]]:
    """Of the weights, and after each batch of all that was read so far: of every linear that can be quantized, each input
    that several read once.

    Args:
        seen: the model's survey.
        batches: [batch, seq_len] token ids each.
        by_rows: role -> scheme with a scale for each row.
    """
    linears = {name: module for name, module in named_linears(model).items() if name not in seen.unfit}
    weights = {name: _effective(module) for name, module in linears.items()}
    experts = list(named_experts(model).values())
    for each in experts:
        parameter = model.get_parameter(f"{each.owner}.{each.leaf}")
        weights |= {
            name: weight.t() if each.transposed else weight
            for name, weight in zip(each.linears, parameter, strict=True)
        }
    found = {
        Slot(name, "weight"): Spread.of(weight, by_rows["weight"], channels_are_rows=True)
        for name, weight in weights.items()
    }
    yield found

    def see(slot: Slot, x: Tensor) -> None:
        here = Spread.of(x, by_rows["input"], channels_are_rows=False)
        found[slot] = found[slot].and_(here) if slot in found else here

    first = {name for name in linears if seen.first_reader[name] == name or seen.first_reader[name] not in linears}
    readers = {name: name for name in linears if name in first}
    readers |= {
        each.owner: each.linears[0] for each in reversed(experts)
    }  # of a module's parameters the first reads it
    with seeing_inputs(model, {module: partial(see, Slot(name, "input")) for module, name in readers.items()}):
        for input_ids in batches:
            model(input_ids=input_ids, use_cache=False)
            yield found


def _effective(linear: Any) -> Tensor:
    """[out, in], whatever way round it is stored."""
    weight: Tensor = linear.weight
    return weight if isinstance(linear, torch.nn.Linear) else weight.t()


@cache
def _points() -> Tensor:
    """[num_bins, POINTS] float32 magnitudes, spread evenly in each bin."""
    low, high = LOG2_EDGES[:-1].exp2(), LOG2_EDGES[1:].exp2()
    places = (torch.arange(POINTS) + 0.5) / POINTS
    return low[:, None] + (high - low)[:, None] * places


def _decibels(signal: Tensor, noise: Tensor) -> float | None:
    return 10 * math.log10(float(signal / noise)) if float(noise) > 0 and float(signal) > 0 else None
