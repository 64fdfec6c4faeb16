"""What `qatrun advise` finds: advice.json, and a line of measured.jsonl for each model that was scored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from qatrun.files import Record
from qatrun.records.scores import TextScore
from qatrun.records.values import Interval, Number, Verdict

Way = Literal["ptq", "ptq with some kept", "qat", "not known"]


class ScoredRow(Record):
    """The plain model or one made by calibration, with these linears in BF16, as it was scored."""

    name: str
    kept: list[str]
    score: TextScore


class Candidate(Record):
    """A format with granularities, made of the start model by calibration.

    Attributes:
        weight, input: granularities.
        calibration: keys of `qat.calibration` that are not at their defaults.
        kept: linears that stay in BF16, beside those that the recipe leaves there.
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
    kept: list[str] = Field(default_factory=list)

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
        sensitivity: what the search for linears to keep came to, in words; None where it was not asked.
        curve: folder of that search.
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
    sensitivity: str | None
    curve: str | None
    answer: str
    recipe: str
