"""Whether an engine computes what was scored: linear by linear on the same inputs, and the whole model on the same text.

The scored model multiplies grid values and scales after, y = (q_x @ q_w^T) * (s_x * s_w); engines on a CPU multiply what
the codes stand for, y = (q_x s_x) @ (q_w s_w)^T. Where the scales are powers of two both are the same float numbers, bit for
bit. Else they differ by float32's rounding, 1e-6 of max |y| at most, and through the layers such a difference may move an
input over a rounding edge: so linears are compared one by one, on the same inputs, and in float32.

Even then an input may be quantized otherwise: engines divide by s where we multiply by 1 / s, which rounds other values
half-way between two codes to one of them, and INT8 reaches to -128 there. Rows of y with such an input are counted apart.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatrun.data import IGNORE_INDEX
from qatrun.evaluate.context import evaluation_mode
from qatrun.numerics import inverse_scale
from qatrun.quant import QTensor, QuantizedLinear, quantized_linears
from qatrun.quant.matmul import scaled_matmul
from qatrun.records.export import LinearsProof, TextProof

TOLERANCE = 1e-6  # of max |y|
LEAST_INT8 = -127  # when scored; -128 in engines

# (linear of the engine, input) -> token scales that the engine finds; None where they are in the file.
TokenScales = Callable[[nn.Module, Tensor], Tensor | None]


class Text(NamedTuple):
    """What models are compared on.

    Attributes:
        what: in words.
        input_ids: [num, seq_len].
        labels: same shape, IGNORE_INDEX where a token does not count; None: no text, so that perplexity means nothing.
    """

    what: str
    input_ids: Tensor
    labels: Tensor | None


@torch.no_grad()
def compare_linears(
    engine: str, scored: Any, exported: Any, input_ids: Tensor, token_scales: TokenScales
) -> LinearsProof:
    """Compare each quantized linear of a frozen model with the engine's, on the inputs that the frozen one has for a batch.

    Args:
        scored, exported: both in float32 (see `in_float32`).
    """
    tally = _Tally()
    handles = [
        linear.register_forward_hook(partial(_compare, tally, exported.get_submodule(name), token_scales))
        for name, linear in quantized_linears(scored).items()
    ]
    try:
        with evaluation_mode(scored), evaluation_mode(exported):
            scored(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return LinearsProof(engine=engine, linears=len(handles), **vars(tally))


def in_float32(scored: Any) -> Any:
    """A copy of a frozen model that computes in float32."""
    return copy.deepcopy(scored).float()


@torch.no_grad()
def compare_text(
    engine: str, scored: Any, exported: Any, text: Text, *, batch_size: int, must_be_equal: bool
) -> TextProof:
    """Compare what a frozen model and the engine's say of each next token.

    Args:
        scored, exported: in one dtype.
        must_be_equal: whether nothing may differ (see `TextProof`).
    """
    labels = text.input_ids if text.labels is None else text.labels
    tokens = same = counted = 0
    equal, largest, nats = True, 0.0, [0.0, 0.0]
    with evaluation_mode(scored), evaluation_mode(exported):
        for ids, wanted in zip(text.input_ids.split(batch_size), labels.split(batch_size), strict=True):
            both = [model(input_ids=ids, use_cache=False).logits.float() for model in (scored, exported)]
            equal = equal and torch.equal(*both)
            largest = max(largest, float((both[0] - both[1]).abs().max()))
            same += int((both[0].argmax(-1) == both[1].argmax(-1)).sum())
            tokens += ids.numel()
            counted += int((wanted[:, 1:] != IGNORE_INDEX).sum())
            for which, logits in enumerate(both):
                predicted = logits[:, :-1].transpose(1, 2)
                nats[which] += float(
                    F.cross_entropy(predicted, wanted[:, 1:], ignore_index=IGNORE_INDEX, reduction="none")
                    .double()
                    .sum()
                )
    perplexities = [None if text.labels is None else math.exp(total / counted) for total in nats]
    return TextProof(
        engine=engine,
        text=text.what,
        tokens=tokens,
        dtype=str(scored.dtype).removeprefix("torch."),
        perplexity_scored=perplexities[0],
        perplexity_exported=perplexities[1],
        same_top1=same / tokens,
        equal=equal,
        must_be_equal=must_be_equal,
        max_difference=largest,
    )


class _Tally:
    """What `LinearsProof` is made of, summed over linears."""

    def __init__(self) -> None:
        self.rows = self.rows_equal = self.rows_tied = self.rows_clipped = 0
        self.worst = self.worst_otherwise = 0.0
        self.scales_are_the_engines = False


def _compare(
    tally: _Tally,
    theirs: nn.Module,
    token_scales: TokenScales,
    linear: QuantizedLinear,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    """A forward hook of the frozen linear: its output beside the engine's, row by row."""
    x = inputs[0]
    scale, scheme = token_scales(theirs, x), linear.input_scheme
    if scale is None:
        scale, ours = linear.input_scale, output
    else:
        tally.scales_are_the_engines = True
        values = linear.input_grid.round(x * inverse_scale(scale), scheme.limit)
        on_x = QTensor(linear.input_grid, values, None, scale)
        ours = scaled_matmul(on_x, linear.weight, linear.bias, x.dtype)
    both = [linear.input_grid.round(scaled, scheme.limit) for scaled in (x * inverse_scale(scale), x / scale)]
    tied = (both[0] != both[1]).any(-1)
    clipped = ((x / scale).round() < LEAST_INT8).any(-1) & (scheme.format == "int8")
    y = theirs(x)
    error = (y - ours).abs().amax(-1) / ours.abs().max()
    otherwise = tied | clipped
    tally.rows += error.numel()
    tally.rows_equal += int((y == ours).all(-1).sum())
    tally.rows_tied += int(tied.sum())
    tally.rows_clipped += int(clipped.sum())
    tally.worst = max(tally.worst, _largest(error[~otherwise]))
    tally.worst_otherwise = max(tally.worst_otherwise, _largest(error[otherwise]))


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
