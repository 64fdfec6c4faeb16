"""What training writes: metrics.jsonl, alarms.jsonl, result.json, and progress.json of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator
from typing_extensions import TypedDict  # pydantic reads it before Python 3.12

from qatrun.files import Record
from qatrun.records.comparison import Cost
from qatrun.records.values import Number, Step


class MetricsRow(TypedDict):
    """A line of metrics.jsonl: one optimizer step.

    Attributes:
        loss: cross-entropy, whatever else is made small.
        distill_kl: from the teacher, nats a token at the temperature of the distillation.
        kl_off, kl_on: of a probed step, KL from the start model, nats a token, quantizers off and, once in use, on.
        nll_start, nll_off, nll_on: on the same text, nats a token; of the start model, and now.
    """

    step: Annotated[int, Field(ge=1, lt=2**31)]
    phase: Literal["bf16", "qat"]
    loss: Number
    distill_kl: NotRequired[float]
    learning_rate: NotRequired[float]
    grad_norm: NotRequired[float]
    num_saturated: NotRequired[int]
    tokens: NotRequired[int]
    kl_off: NotRequired[float]
    kl_on: NotRequired[float]
    nll_start: NotRequired[float]
    nll_off: NotRequired[float]
    nll_on: NotRequired[float]


class AlarmRow(TypedDict):
    """A line of alarms.jsonl: what goes wrong since about this step.

    Attributes:
        kind: saturation, resolution, forgetting, divergence (as of a diagnosis), quantization, moved (a high KL without a
            rise of the loss) or input (of the first step: it is the text, not the training).
        step: optimizer steps done.
        tensor: the worst one; None where it concerns the whole model.
    """

    step: Step
    kind: str
    text: str
    tensor: NotRequired[str | None]


def distinct(alarms: Iterable[AlarmRow]) -> list[AlarmRow]:
    """Each once: what the trunk raised stands in the record of every arm."""
    return list({(row["step"], row["kind"], row["text"]): row for row in alarms}.values())


class Progress(TypedDict):
    """progress.json of a checkpoint, as far as it has a form of its own."""

    step: Step


class Outcome(Record):
    """What is known when a segment is done; result.json of a trunk.

    Attributes:
        data_hash: of all token ids consumed since step 0.
        seconds: time spent in optimizer steps since step 0, the trunk's included.
    """

    steps: int
    data_hash: str
    seconds: float
    peak_memory_bytes: int


class Result(Record):
    """result.json of the start model or of an arm, as far as both have it: `perplexity` is of held-out text, with quantizers
    "on" (or of a model without any) and "off"."""

    arm: str
    perplexity: dict[str, float]
    twin: str | None = None
    coverage: str | None = None


class Match(TypedDict):
    """In what an arm must agree with its twin; model, warmup and all of `train` that decides a number are in it, too."""

    steps: Annotated[int, Field(ge=0)]
    seed: int
    data_hash: str


def _as_it_stands(match: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """With the settings that Match does not name, and in the order in which a mismatch names them."""
    check(match)
    return match


class ArmResult(Record):
    """result.json of a trained arm; `perplexity` as of Result.

    Attributes:
        method: "qat", or "ptq" for one that was made by calibration alone, whose `match` is that of what it was made from.
        weights: weights file or plan, relative to the arm's folder -> SHA-256 of what was scored.
        made_from: of a "ptq" arm, `weights` of its twin; nothing where that is the start model.
    """

    arm: str
    twin: str | None
    method: Literal["qat", "ptq"] = "qat"
    match: Annotated[Match, WrapValidator(_as_it_stands)]
    cost: Cost
    coverage: str | None
    perplexity: dict[str, float]
    sizes: dict[str, int]
    weights: dict[str, str] = Field(default_factory=dict)
    made_from: dict[str, str] = Field(default_factory=dict)
