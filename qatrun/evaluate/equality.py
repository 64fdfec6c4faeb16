"""Whether an engine computes what was scored: linear by linear on the same inputs, and the whole model on the same text.

The scored model multiplies grid values and scales after, y = (q_x @ q_w^T) * (s_x * s_w); engines on a CPU multiply what
the codes stand for, y = (q_x s_x) @ (q_w s_w)^T. Where the scales are powers of two both are the same float numbers, bit for
bit. Else they differ by float32's rounding, 1e-6 of max |y| at most, and through the layers such a difference may move an
input over a rounding edge: so linears are compared one by one, on the same inputs, and in float32.

Even then an input may be quantized otherwise: engines divide by s where we multiply by 1 / s, which rounds other values
half-way between two codes to one of them, and INT8 reaches to -128 there. So the engine's y is held against the product of
the engine's codes, and the rows in which these are not ours are counted, with what that changes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qatrun.data import IGNORE_INDEX
from qatrun.evaluate.context import evaluation_mode
from qatrun.evaluate.engines import ENGINES
from qatrun.numerics import inverse_scale, own_fit
from qatrun.numerics.int8 import ShiftedIntegers
from qatrun.quant import QTensor, QuantizedLinear, quantized_linears
from qatrun.quant.matmul import scaled_matmul
from qatrun.records.export import LinearsProof, TextProof

TOLERANCE = 1e-6  # of max |y|
LEAST_INT8 = -127  # when scored; -128 in engines


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
def compare_linears(name: str, scored: Any, exported: Any, input_ids: Tensor) -> LinearsProof:
    """Compare each quantized linear of an engine's model with the frozen one's, on the inputs that it has there.

    Args:
        name: of the engine.
        scored, exported: both in float32 (see `in_float32`).
        input_ids: [num, seq_len].
    """
    engine, linears, tally = ENGINES[name], quantized_linears(scored), _Tally()

    def seen(linear: str, x: Tensor, y: Tensor, scale: Tensor | None) -> None:
        _compare(tally, linears[linear], x, y, scale, codes_as_scored=engine.codes_as_scored)

    with evaluation_mode(scored), evaluation_mode(exported):
        widths = {linear: sum(module.q_weight.shape) for linear, module in linears.items()}
        assert engine.trace is not None  # the first of an export's engines has it
        engine.trace(exported, widths, input_ids, seen)
    return LinearsProof(engine=name, linears=len(linears), **vars(tally))


def in_float32(scored: Any) -> Any:
    """A copy of a frozen model that computes in float32."""
    return copy.deepcopy(scored).float()


@torch.no_grad()
def compare_text(name: str, scored: Any, exported: Any, text: Text, *, batch_size: int, exact: bool) -> TextProof:
    """Compare what a frozen model and the engine's say of each next token.

    Args:
        scored, exported: in one dtype.
        name: of the engine.
        exact: whether every scale is a power of two that the engine takes from the file.
    """
    labels = text.input_ids if text.labels is None else text.labels
    tokens = same = counted = 0
    equal, largest, nats = True, 0.0, [0.0, 0.0]
    with evaluation_mode(scored), evaluation_mode(exported), _clips_counted(scored, name) as clips:
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
        engine=name,
        text=text.what,
        tokens=tokens,
        dtype=str(scored.dtype).removeprefix("torch."),
        perplexity_scored=perplexities[0],
        perplexity_exported=perplexities[1],
        same_top1=same / tokens,
        equal=equal,
        values_clipped=sum(clips),
        must_be_equal=exact and ENGINES[name].is_torch and not sum(clips),
        other_kernels=not ENGINES[name].is_torch,
        max_difference=largest,
    )


@contextmanager
def _clips_counted(scored: Any, name: str) -> Iterator[list[int]]:
    """Of every input that a frozen model quantizes meanwhile: how many values engines clip at another code."""
    counts: list[int] = []

    def count(linear: QuantizedLinear, inputs: tuple[Tensor, ...]) -> None:
        counts.append(int(_clipped_otherwise(linear, inputs[0] * linear.input_inv_scale).sum()))

    handles = [
        linear.register_forward_pre_hook(count)
        for linear in quantized_linears(scored).values()
        if not linear.input_scheme.per_row and not ENGINES[name].codes_as_scored
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _clipped_otherwise(linear: QuantizedLinear, scaled: Tensor) -> Tensor:
    """Where inputs, in units of the grid, are clipped at -128 by engines; shape of the inputs, bool."""
    return (scaled.round() < LEAST_INT8) & (linear.input_scheme.format == "int8" and linear.input_scheme.symmetric)


class _Tally:
    """What `LinearsProof` is made of, summed over linears."""

    def __init__(self) -> None:
        self.rows = self.rows_equal = self.rows_tied = self.rows_clipped = 0
        self.worst = self.worst_otherwise = 0.0
        self.scales_are_the_engines = False


def _compare(
    tally: _Tally, linear: QuantizedLinear, x: Tensor, y: Tensor, scale: Tensor | None, *, codes_as_scored: bool
) -> None:
    """Hold an engine's output y against the product that was scored: of the codes that the engine makes of x, and of those
    that were scored."""
    scheme, zero = linear.input_scheme, linear.input_zero_point
    tally.scales_are_the_engines |= scale is not None
    if scale is None:
        scale = own_fit(x, scheme)[0] if scheme.per_row else linear.input_scale
    grid = linear.input_grid if zero is None else ShiftedIntegers(zero.float())
    codes = grid.round(x * inverse_scale(scale), scheme.limit)
    clipped = _clipped_otherwise(linear, x / scale)
    # Under a zero-point engines round x / s + z, whose halves go to other numbers.
    engine_codes = grid.round(x / scale, scheme.limit) if zero is None else _affine(x / scale, zero.float())
    engine_codes = torch.where(clipped, float(LEAST_INT8 - 1), engine_codes)
    if codes_as_scored:
        engine_codes = codes
    ours, expected = (
        scaled_matmul(QTensor(grid, values, None, scale), linear.weight, linear.bias, x.dtype)
        for values in (codes, engine_codes)
    )
    different = codes != engine_codes
    tally.rows += y[..., 0].numel()
    tally.rows_equal += int((y == ours).all(-1).sum())
    tally.rows_clipped += int((different & clipped).any(-1).sum())
    tally.rows_tied += int((different & ~clipped).any(-1).sum())
    tally.worst = max(tally.worst, _error(y, expected))
    tally.worst_otherwise = max(tally.worst_otherwise, _error(expected, ours))


def _affine(scaled: Tensor, zero: Tensor) -> Tensor:
    """Inputs, in units of the grid, as engines round them under a zero-point: codes less it."""
    return (scaled + zero).round().clamp(-128.0, 127.0) - zero


def _error(y: Tensor, reference: Tensor) -> float:
    """Largest difference over max |y|."""
    return float((y - reference).abs().max() / reference.abs().max())
