"""What `qatrun advise` finds: advice.json, and a line of measured.jsonl for each model that was scored."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic reads it before Python 3.12

from qatrun.files import Record
from qatrun.records.values import Interval, Number, Verdict

Way = Literal["ptq", "ptq with some kept", "qat", "not known"]


class ScoredRow(TypedDict):
    """A model, the plain one or one made by calibration, and its TextScore as plain data."""

    name: str
    score: dict[str, Any]


class Candidate(Record):
    """A format with granularities, made of the start model by calibration.

    Attributes:
        weight, input: granularities.
        calibration: keys of `qat.calibration` that are not at their defaults.
        weight_bytes: of the whole model, scales aside: 8-bit linears, the rest in BF16; estimated from shapes.
        nats: a token more than the plain model takes on held-out text; None where it cannot be made.
        ci95: over sequences, paired; those of all candidates hold together.
        verdict: on the budget.
        runs: what it runs as on the hardware asked about; None where none was.
        why: it does not run natively, or cannot be made.
    """

    name: str
    format: str
    weight: str
    input: str
    calibration: dict[str, Any]
    weight_bytes: int | None
    nats: Number | None
    ci95: Interval | None
    verdict: Verdict | None
    runs: str | None
    why: str

    @property
    def is_advisable(self) -> bool:
        """Whether it was measured, and runs natively where that was asked."""
        return self.nats is not None and self.runs in (None, "natively")


class Advice(Record):
    """advice.json.

    Attributes:
        budget: nats a token.
        plain_nats: what the model takes without quantization, a token.
        num_tokens, num_sequences: of the held-out text.
        bf16_bytes: of the model's weights; estimated from shapes.
        memory_bytes: arm of the recipe -> phase -> estimated peak.
        candidates: those that can be advised first, by what they lose.
        advised: name of the candidate that the recipe is of.
        way: how.
        tokens_needed: of held-out text, for the budget to be decided by; None where it is, or no text would.
        kept: linears to leave in BF16.
        sensitivity: what that search answered, in words; None where it was not asked.
        answer: in words.
        recipe: file name.
    """

    source: str
    model: str
    hardware: str | None
    budget: Number
    plain_nats: Number
    num_tokens: int
    num_sequences: int
    bf16_bytes: int
    memory_bytes: dict[str, dict[str, int]]
    candidates: list[Candidate]
    advised: str
    way: Way
    tokens_needed: int | None
    kept: list[str]
    sensitivity: str | None
    answer: str
    recipe: str
