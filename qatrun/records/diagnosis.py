"""diagnosis.json: what a drop is made of, what broke, where and since when."""

from __future__ import annotations

from pydantic import Field

from qatrun.files import Record
from qatrun.records.values import Answer, Interval


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


class TextEffect(Record):
    """What is lost from one model to another on one text: the rise of its negative log-likelihood, nats a token.

    Attributes:
        rise: over all targets; `ci95` is Student's t over sequences, both models having read the same.
        strata: of `records.scores.STRATA` -> [rise, low, high]; the three intervals hold together at 95 %.
    """

    rise: float
    ci95: Interval
    num_tokens: int
    strata: dict[str, list[float]] = Field(default_factory=dict)


class Look(Record):
    """One measure of whether a cause did harm.

    Attributes:
        what: the measure, in words.
        effects: names of what was measured; all of them must matter.
        values: of each effect, in `unit`; `intervals` hold together at 95 % over all looks at this cause.
        threshold: above which an effect matters.
        decides: whether it can rule the cause out; else it can only find it.
    """

    what: str
    effects: list[str]
    values: list[float]
    intervals: list[Interval]
    threshold: float
    unit: str
    decides: bool
    answer: Answer


class Cause(Record):
    """Whether something did harm.

    Attributes:
        could_hide: in `unit`, the most that the looks that decide leave open where it is not shown; None where none of them
            has a bound.
    """

    answer: Answer
    could_hide: float | None = None
    unit: str = ""
    looks: list[Look] = Field(default_factory=list)


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
        findings: causes that were found, most basic first.
        causes: of `evaluate.attribution.CAUSES` -> found, ruled out or not shown. That nothing broke is said only where
            all are ruled out.
        texts: effect -> text ("held-out", "known") -> what was lost on it.
        known_text: what "known" is, in words; empty where there is no such text.
        tasks: task -> its effects, where `effects` are those over all tasks.
        accuracy: task -> model -> accuracy on the items that all models answered.
        perplexity: model -> perplexity of held-out text.
        probe: model -> KL from the start model at the last probe, nats per token; empty where there was none.
        worst_tensors: the few that clip most.
        since_step: the first step that showed the first cause.
    """

    sentence: str
    findings: list[str]
    causes: dict[str, Cause] = Field(default_factory=dict)
    texts: dict[str, dict[str, TextEffect]] = Field(default_factory=dict)
    known_text: str = ""
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
