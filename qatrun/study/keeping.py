"""Which input groups to leave in BF16 for a budget: pure functions of what each costs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qatrun.errors import InputError
from qatrun.quant.sensitivity import Cost
from qatrun.records.sensitivity import Budget, CurvePoint, GroupCost, MeasuredCost, Unit

BITS, KEPT_BITS = 8, 16  # of a weight, quantized and in BF16
# A curve is flat where the best quarter of the weights, kept, still leaves so much of the cost. Measured: INT8 with four
# sensitive down-projections leaves 0.04, HiF8 and E4M3 of the same model 0.5.
QUARTER, FLAT_ABOVE = 0.25, 1 / 3
MOST = 100.0  # nats a token: no vocabulary is so large that guessing takes as many
_BUDGET = re.compile(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+) *(%|bits|nats)?")
_UNITS: Mapping[str | None, Unit] = {None: "nats", "nats": "nats", "%": "percent", "bits": "bits"}


@dataclass(frozen=True)
class Part:
    """An input group as it was scored.

    Attributes:
        linears: as a recipe names them.
        cost: nats a token.
    """

    linears: tuple[str, ...]
    num_weights: int
    cost: Cost


def parse_budget(text: str) -> Budget:
    """`0.002` (nats a token), `1%` (rise of perplexity) or `9.5bits` (average of a weight).

    Raises:
        InputError: it is none of them.
    """
    found = _BUDGET.fullmatch(text.strip())
    value = float(found[1]) if found else math.nan
    unit = _UNITS[found[2]] if found else "nats"
    if not 0 < value < math.inf or in_nats(Budget(value=value, unit=unit)) > MOST:
        raise InputError(
            f"--budget {text}: must be nats a token (0.002), a rise of perplexity (1%) or the average bits of a weight "
            "(9.5bits)"
        )
    if unit == "bits" and not BITS <= value < KEPT_BITS:
        raise InputError(
            f"--budget {text}: a weight has {BITS} bits where it is quantized and {KEPT_BITS} where it is kept: at least "
            f"{BITS} and below {KEPT_BITS}"
        )
    return Budget(value=value, unit=unit)


def in_nats(budget: Budget) -> float:
    """A token, of a budget that is not in bits."""
    return math.log1p(budget.value / 100) if budget.unit == "percent" else budget.value


def in_words(budget: Budget) -> str:
    """As a sentence names it."""
    unit = {"nats": " nats a token", "percent": "% of perplexity", "bits": " bits a weight"}[budget.unit]
    return f"{budget.value:g}{unit}"


def ranked(parts: Mapping[str, Part], scale: float) -> list[GroupCost]:
    """The groups, those first that cost most for each weight; none is kept yet.

    Args:
        parts: by the name of the group.
        scale: what estimates are multiplied by.
    """
    total = sum(part.num_weights for part in parts.values())
    order = sorted(parts, key=lambda name: -parts[name].cost.nats / parts[name].num_weights)
    return [
        GroupCost(
            name=name,
            linears=list(parts[name].linears),
            num_weights=parts[name].num_weights,
            share=parts[name].num_weights / total,
            nats=scale * parts[name].cost.nats,
            sqnr_db=_decibels(parts[name].cost),
            bits=(KEPT_BITS - BITS) * parts[name].num_weights / total,
            kept=False,
        )
        for name in order
    ]


def curve_of(groups: Sequence[GroupCost]) -> list[CurvePoint]:
    """What remains with none of them kept, with the first, and so on to all."""
    shares = np.cumsum([0.0, *(group.share for group in groups)])
    left = sum(group.nats for group in groups) - np.cumsum([0.0, *(group.nats for group in groups)])
    return [
        CurvePoint(
            num_kept=number,
            bits=float(BITS + (KEPT_BITS - BITS) * share),
            share=float(share),
            nats=max(0.0, float(nats)),
        )
        for number, (share, nats) in enumerate(zip(shares, left, strict=True))
    ]


def is_flat(curve: Sequence[CurvePoint]) -> bool:
    """Whether no few groups carry the cost."""
    left = np.interp(QUARTER, [point.share for point in curve], [point.nats for point in curve])
    return bool(left > FLAT_ABOVE * curve[0].nats)


def num_kept(curve: Sequence[CurvePoint], budget: Budget) -> int:
    """How many groups the budget asks to keep, by the estimate; of bits, how many it lets one keep."""
    if budget.unit == "bits":
        return max(point.num_kept for point in curve if point.bits <= budget.value + 1e-9)
    return next(point.num_kept for point in curve if point.nats <= in_nats(budget))  # with all kept nothing is left


def spent(measured: MeasuredCost, budget: Budget) -> float:
    """What was measured in the unit of the budget; beside one of bits, nats."""
    return measured.perplexity_percent if budget.unit == "percent" else measured.nats


def answer(
    groups: Sequence[GroupCost],
    curve: Sequence[CurvePoint],
    budget: Budget,
    everything: MeasuredCost,
    choice: MeasuredCost | None,
) -> str:
    """What to do, in a sentence or two."""
    whole = f"with everything quantized {_costs_in_words(everything)}"
    number = sum(group.kept for group in groups)
    if choice is None:
        if budget.unit == "bits":
            return f"nothing is kept: the first in line takes {curve[1].bits:.2f} bits a weight; {whole}"
        return f"nothing to keep: {whole}, within the budget of {in_words(budget)}"
    point, named = curve[number], in_words(budget)
    said = (
        f"keep {number} of {len(groups)} groups in BF16, {100 * point.share:.0f} % of the weights, {point.bits:.2f} bits a "
        f"weight: {_costs_in_words(choice)}; {whole}"
    )
    if budget.unit != "bits" and spent(choice, budget) > budget.value:
        said += f"; measured it is above the budget of {named}"
    if is_flat(curve):
        said = (
            "nothing is worth keeping for itself: the curve is flat, no few linears carry the cost, and scales for each "
            f"channel and token, or another format, do more for less; for the budget of {named} {said}"
        )
    return said


def _costs_in_words(measured: MeasuredCost) -> str:
    interval = "" if measured.nats_ci95 is None else " [{:.5f}, {:.5f}]".format(*measured.nats_ci95)
    return f"{measured.nats:.5f} nats a token{interval}, perplexity {measured.perplexity_percent:+.2f} %"


def _decibels(cost: Cost) -> float | None:
    return 10 * math.log10(cost.signal / cost.noise) if cost.noise and cost.signal else None
