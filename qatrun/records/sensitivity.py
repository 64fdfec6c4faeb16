"""What `qatrun sensitivity` finds: sensitivity.json, and a line of costs.jsonl for each part of the text."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict  # pydantic reads it before Python 3.12

from qatrun.files import Record
from qatrun.records.values import Interval

Unit = Literal["nats", "percent", "bits"]
Method = Literal["one backward", "one at a time"]


class CostRow(TypedDict):
    """Of some modules on one batch of text.

    Attributes:
        name: a module, or the first one of an input group.
        nats, signal, noise: sums (see `quant.sensitivity.Cost`).
    """

    batch: int
    name: str
    nats: float
    signal: float
    noise: float


class GroupCost(Record):
    """An input group, in the order in which groups are kept.

    Attributes:
        linears: that read one tensor, or the parameters of a module's experts; as a recipe names them.
        share: of all weights that the plan quantizes.
        nats: a token; what quantizing it costs, so scaled that all groups together cost what was measured.
        sqnr_db: of the linears' outputs; None where nothing is lost.
        bits: added to the average by keeping it.
        kept: whether the choice does.
    """

    name: str
    linears: list[str]
    num_weights: int
    share: float
    nats: float
    sqnr_db: float | None
    bits: float
    kept: bool


class CurvePoint(Record):
    """The first groups kept in BF16.

    Attributes:
        bits: average over the plan's weights.
        share: of those weights that are kept.
        nats: estimated, a token.
    """

    num_kept: int
    bits: float
    share: float
    nats: float


class MeasuredCost(Record):
    """On held-out text, against the same model without quantizers.

    Attributes:
        nats: KL a token; `nats_ci95` over the sequences, None of fewer than two.
        perplexity_percent: rise, with its interval likewise.
    """

    nats: float
    nats_ci95: Interval | None
    perplexity_percent: float
    perplexity_ci95_percent: Interval | None


class Budget(Record):
    """What may remain, as it was asked for."""

    value: float
    unit: Unit


class Sensitivity(Record):
    """sensitivity.json.

    Attributes:
        num_tokens: of the text on which groups were scored, and of the held-out text.
        sum_of_parts: estimated cost of all groups together, nats a token; `all_quantized` measured on the same text.
        everything, choice: measured on held-out text; the choice is None where nothing is kept.
        flat: whether no few groups carry the cost.
        answer: in words.
        fragment: file name of the recipe that keeps the choice; None where nothing is kept.
    """

    recipe: str
    arm: str
    formats: list[str]
    method: Method
    num_tokens: tuple[int, int]
    budget: Budget
    sum_of_parts: float
    all_quantized: float
    groups: list[GroupCost]
    curve: list[CurvePoint]
    everything: MeasuredCost
    choice: MeasuredCost | None
    flat: bool
    answer: str
    fragment: str | None
