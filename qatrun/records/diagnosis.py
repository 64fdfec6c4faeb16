"""diagnosis.json: what a drop is made of, what broke, where and since when."""

from __future__ import annotations

from pydantic import Field

from qatrun.files import Record
from qatrun.records.values import Interval


class Effect(Record):
    """What is lost from one model to another, over the items that both answered.

    Attributes:
        drop_pp: accuracy, percentage points; `ci95_pp` as `paired.drop_interval` has it.
        loglikelihood: log-probability of the right answer among the item's choices, nats lost, mean over items; its
            interval is Student's t over items.
        text_loglikelihood: log-likelihood of the right answer's own text, nats lost a token; its interval likewise.
        log_perplexity: rise of the held-out text's log-perplexity, nats per token; None where it is not known.
    """

    name: str
    source: str = Field(alias="from")
    target: str = Field(alias="to")
    drop_pp: float
    ci95_pp: Interval
    loglikelihood: float
    ci95_loglikelihood: Interval
    text_loglikelihood: float
    ci95_text_loglikelihood: Interval
    log_perplexity: float | None


class TensorRecord(Record):
    """One quantized tensor over the QAT phase.

    Attributes:
        tensor: `<linear>:<role>`.
        clip_fraction: mean over the steps.
        overshoot: the largest of its amax over what the scale stood for.
        typical_overshoot: the median of that; None where it is not known.
        sqnr_db: the last one measured; None if none was.
        since_step: the first step in which it clipped noticeably; None if it never did.
        scale: the last one used; None where each channel or token has its own.
    """

    tensor: str
    clip_fraction: float
    overshoot: float
    sqnr_db: float | None
    since_step: int | None
    scale: float | None = None
    typical_overshoot: float | None = None


class ArmDiagnosis(Record):
    """One arm's. Models are "start", "twin", "ptq", "off", "on" and "fresh"; see `evaluate.attribution`.

    Attributes:
        findings: causes that were found, most basic first; none for a healthy run.
        tasks: task -> its effects, where `effects` are those over all tasks.
        accuracy: task -> model -> accuracy on the items that all models answered.
        perplexity: model -> perplexity of held-out text.
        probe: model -> KL from the start model at the last probe, nats per token; empty where there was none.
        worst_tensors: the few that clip most.
        since_step: the first step that showed the first cause.
    """

    sentence: str
    findings: list[str]
    effects: list[Effect] = Field(default_factory=list)
    tasks: dict[str, list[Effect]] = Field(default_factory=dict)
    accuracy: dict[str, dict[str, float]] = Field(default_factory=dict)
    perplexity: dict[str, float] = Field(default_factory=dict)
    probe: dict[str, float] = Field(default_factory=dict)
    worst_tensors: list[TensorRecord] = Field(default_factory=list)
    since_step: int | None = None


class StudyDiagnosis(Record):
    """diagnosis.json."""

    sentence: str
    arms: dict[str, ArmDiagnosis]
