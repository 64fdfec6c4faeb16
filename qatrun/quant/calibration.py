"""Scales from some batches alone, and how the values of inputs spread over the grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qatrun.formats import Role
from qatrun.numerics import inverse_scale
from qatrun.quant.attach import attached_state
from qatrun.quant.experts import FakeQuantExperts
from qatrun.quant.hooks import seeing_inputs
from qatrun.quant.linear import FakeQuantLinear
from qatrun.quant.plan import QuantPlan, Schemes
from qatrun.quant.qtensor import to_grid
from qatrun.quant.quantizer import Quantizer
from qatrun.quant.state import Mode, QuantState
from qatrun.scheme import Scaling, Scheme, Slot

SHRUNK = [0.9**n for n in range(24)]  # of the scale that fits the largest value; outliers of 12 times the rest
CALIBRATED = Scaling(type="delayed", algorithm="max", window=1)
LOG2_BINS = torch.arange(-24.0, 16.25, 0.25)  # of |x| in units of the grid; HiF8 reaches from 2^-22 to 2^15


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], *, least_error: bool = False) -> None:
    """Give an attached model scales from these batches of token ids ([batch, seq_len] each) alone: the largest amax of
    each tensor, whatever the plan's algorithm. It is left quantizing, in eval mode.

    Args:
        least_error: inputs have the scale instead that loses least of them in mean square, of those that `SHRUNK` gives.
    Raises:
        InputError: nothing is attached.
    """
    state, batches = attached_state(model), list(batches)
    state.forget()
    model.eval()
    observing = [
        module for module in model.modules() if isinstance(module, QuantState | FakeQuantLinear | FakeQuantExperts)
    ]
    for module in observing:
        module.training = True
    state.enter(Mode.OBSERVE)
    for input_ids in batches:
        model(input_ids=input_ids, use_cache=False)
    state.push()
    model.eval()
    state.enter(Mode.QUANTIZE)
    if least_error:
        with state.computing(Mode.OFF):
            factors = _least_errors(model, batches, state)
        state.scales.multiply(factors)
    state.tally.take()  # none of it is of a step


def _least_errors(model: nn.Module, batches: Iterable[Tensor], state: QuantState) -> Tensor:
    """[num_slots] of SHRUNK: what to multiply the scale of each input of a whole tensor by; 1 elsewhere."""
    quantizers = {
        quantizer.index: (name, quantizer)
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantLinear)
        for quantizer in [module.quant.of["input"]]
        if not quantizer.scheme.per_row and quantizer.scheme.scaling.type != "none"
    }
    device = state.scales.scale.device
    errors = {index: torch.zeros(len(SHRUNK), dtype=torch.float64, device=device) for index in quantizers}

    def measure(quantizer: Quantizer, x: Tensor) -> None:
        scale, _, zero = state.scales.fit(quantizer.index)
        for number, factor in enumerate(_factors(quantizer.scheme)):
            shrunk = scale * factor
            on_x, _ = to_grid(x, quantizer.scheme, (shrunk, inverse_scale(shrunk), zero), torch.float32)
            errors[quantizer.index][number] += (x.float() - on_x.dequantized()).square().sum()

    with seeing_inputs(model, {name: partial(measure, quantizer) for name, quantizer in quantizers.values()}):
        for input_ids in batches:
            model(input_ids=input_ids, use_cache=False)
    factors = torch.ones(len(state.scales.names))
    for index, (_, quantizer) in quantizers.items():
        factors[index] = _factors(quantizer.scheme)[int(errors[index].argmin())]
    return factors.to(device)


def _factors(scheme: Scheme) -> Sequence[float]:
    """Of one length; where scales are powers of two, powers of two."""
    return [2.0**-n for n in range(len(SHRUNK))] if scheme.scaling.to_power_of_two else SHRUNK


def calibrated_plan(plan: QuantPlan, *, keeps_unscaled: bool = False) -> QuantPlan:
    """The plan of the forward with every scale of a whole tensor from calibration, whatever its own scaling; rounded as its
    own are.

    Args:
        keeps_unscaled: tensors that have the scale 1 for a reason keep it.
    """
    schemes: dict[str, Schemes] = {
        name: {
            role: scheme
            if scheme.per_row or (keeps_unscaled and scheme.scaling.type == "none")
            else replace(scheme, scaling=replace(CALIBRATED, rounding=scheme.scaling.rounding))
            for role, scheme in of_roles.items()
            if role != "grad_output"
        }
        for name, of_roles in plan.schemes.items()
    }
    return replace(plan, schemes=schemes, saves_codes=False)


@torch.no_grad()
def statistics(model: nn.Module, input_ids: Tensor) -> Tensor:
    """[num_slots, len(STATISTICS)] of an attached model that quantizes, on this text, [batch, seq_len]; scales stay."""
    state = attached_state(model)
    state.training, state.tally.measures_noise = True, True
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        state.training, state.tally.measures_noise = False, False
    state.tally.note_amax(state.scales.amax)
    state.tally.note_fit(state.scales, primed=state.primed)
    state.scales.amax = torch.zeros_like(state.scales.amax)
    return state.tally.take()


def finest_plan(plan: QuantPlan) -> QuantPlan:
    """The plan with the same formats, and a scale for each channel of a weight and for each token of an input."""
    finest: dict[Role, str] = {"weight": "per_channel", "input": "per_token"}
    schemes = {
        name: {
            role: replace(scheme, granularity=finest[role], scaling=Scaling(type="dynamic"))
            for role, scheme in of_roles.items()
            if role in finest
        }
        for name, of_roles in plan.schemes.items()
    }
    return replace(plan, schemes=schemes, saves_codes=False)


@torch.no_grad()
def input_histograms(
    model: Any, input_ids: Tensor, scales: Mapping[str, float], plan: QuantPlan
) -> list[dict[str, Any]]:
    """How |x| / scale of some inputs is spread over the grid, in bins of log2; plain data.

    Args:
        model: with quantizers attached.
        input_ids: [num, seq_len].
        scales: linear -> scale of its input, units of the tensor per unit of the grid.
    """
    counts: dict[str, Tensor] = {}
    zeros: dict[str, int] = {}

    def count(name: str, x: Tensor) -> None:
        size = (x.float().abs() / scales[name]).cpu()
        counts[name] = torch.histogram(size[size > 0].log2().clamp(LOG2_BINS[0], LOG2_BINS[-1]), LOG2_BINS).hist
        zeros[name] = int((size == 0).sum())

    modules = dict(model.named_modules())
    eyes = {name: partial(count, name) for name in scales if name in modules}  # the linear of an expert is none
    with seeing_inputs(model, eyes):
        model(input_ids=input_ids.to(next(model.parameters()).device), use_cache=False)
    return [
        {
            "tensor": str(Slot(name, "input")),
            "format": scheme.format,
            "scale": scales[name],
            "target_amax": scheme.target_amax,
            "log2_edges": LOG2_BINS.tolist(),
            "counts": [int(value) for value in found],
            "num_zero": zeros[name],
            "num_values": int(found.sum()) + zeros[name],
        }
        for name, found in counts.items()
        for scheme in [plan.schemes[name]["input"]]
    ]
