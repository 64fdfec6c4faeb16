"""SmoothQuant: outliers of an input's channels are moved into the weights that read it.

    s = amax(x) ^ share / amax(W) ^ (1 - share)          channel by channel, rounded to a power of two
    x / s  where x is made (see `folding`),   W * s  in every linear that reads it

A product with a power of two is exact in every float type, so the model computes what it computed before, bit for bit; what
an 8-bit input with one scale for all channels then loses is what changes.

Source: Xiao et al., arXiv:2211.10438, equation 4; there s is not rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qatrun.numerics import amax
from qatrun.quant.folding import Fold
from qatrun.quant.hooks import seeing_inputs
from qatrun.quant.linears import LINEAR_TYPES


@torch.no_grad()
def smooth(model: nn.Module, folds: Sequence[Fold], batches: Iterable[Tensor], share: float) -> None:
    """Scale the channels of folds in place, as inputs of these batches of token ids ([batch, seq_len] each) ask for.

    Args:
        model: without quantizers, its parameters whole.
        share: of the difficulty that goes into the weights; 0 makes inputs no easier, 1 as even as can be.
    """
    ranges = channel_ranges(model, [fold.readers[0] for fold in folds], batches)
    for fold in folds:
        of_input = ranges[fold.readers[0]]
        weights = [_columns(model.get_submodule(name)) for name in fold.readers]
        of_weight = torch.stack([amax(weight.t(), "per_channel").flatten() for weight in weights]).amax(0)
        scale = _powers_of_two(of_input.to(of_weight.device), of_weight, share)
        for weight in weights:
            weight.mul_(scale)
        _divide(model.get_submodule(fold.producer), scale)
    torch.clear_autocast_cache()  # of the weights in bfloat16, as they were


@torch.no_grad()
def channel_ranges(model: nn.Module, names: Iterable[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Linear -> [in] float32, the amax of each channel of its input over all batches."""
    ranges: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        seen = amax(x.reshape(-1, x.shape[-1]).t(), "per_channel").flatten()
        ranges[name] = torch.maximum(ranges[name], seen) if name in ranges else seen

    training = model.training
    model.eval()
    with seeing_inputs(model, {name: partial(see, name) for name in names}):
        for input_ids in batches:
            model(input_ids=input_ids, use_cache=False)
    model.train(training)
    return ranges


def folded(folds: Iterable[Fold], linears: Mapping[str, Any]) -> tuple[Fold, ...]:
    """Those of which some reader is among these linears: others gain nothing."""
    return tuple(fold for fold in folds if any(name in linears for name in fold.readers))


def _powers_of_two(of_input: Tensor, of_weight: Tensor, share: float) -> Tensor:
    """[in] float32; 1 where a channel is never anything else than 0, on either side."""
    exponents = (share * of_input.log2() - (1.0 - share) * of_weight.log2()).round()
    return torch.where(exponents.isfinite(), exponents.clamp(-30, 30), 0.0).exp2()


def _columns(linear: nn.Module) -> Tensor:
    """[out, in], a view of the weight whatever way round it is stored."""
    weight = linear.get_parameter("weight")
    return weight if isinstance(linear, nn.Linear) else weight.t()


def _divide(producer: nn.Module, scale: Tensor) -> None:
    """The channels that it makes, [channels]."""
    is_linear = isinstance(producer, LINEAR_TYPES)
    weight = _columns(producer) if is_linear else producer.get_parameter("weight")
    weight.div_(scale.unsqueeze(1) if is_linear else scale)
    bias = producer._parameters.get("bias")
    if bias is not None:
        bias.div_(scale)
