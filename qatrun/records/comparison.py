"""comparison.json: every quantized arm of a study beside its BF16 twin.

Accuracies are shares of the items, in [0, 1]; fields ending in `_pp` are percentage points.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qatrun.files import Record
from qatrun.records.values import Interval, Verdict


class TaskComparison(Record):
    """One task.

    Attributes:
        others: every other metric that lm-eval gives -> "start", "twin" and "arm", as far as they are known.
        start: accuracy of the model before training; None where it was not scored.
        twin: accuracy of the BF16 twin.
        arm: accuracy of the arm, quantizers on.
        arm_off: accuracy of the arm with its quantizers off; None where it was not scored.
        drop_pp: twin minus arm; `ci95_pp` is its two-sided interval over items.
        drop_relative_percent: the drop in percent of the twin's accuracy; None where the twin gets nothing right.
        mcnemar_p: exact, two-sided.
        flips_to_wrong: items right in the twin and wrong in the arm; `flips_to_right` the other way round.
        mean_abs_delta_loglikelihood: nats, of the right answer, arm against twin.
        detectable_drop_pp: smallest drop that this many items would show at 80% power, at the observed rate of flips.
        verdict: `exceeds` is controlled over all rows of an arm, see `evaluate.paired.judge`.
        items_to_settle: about how many items would settle it with 80% power; None where it is settled, or the drop equals
            the budget.
    """

    task: str
    metric: str
    num_fewshot: int
    num_items: int
    start: float | None
    twin: float
    arm: float
    arm_off: float | None
    drop_pp: float
    drop_relative_percent: float | None
    ci95_pp: Interval
    mcnemar_p: float
    flips_to_wrong: int
    flips_to_right: int
    mean_abs_delta_loglikelihood: float
    detectable_drop_pp: float
    budget_pp: float
    verdict: Verdict
    items_to_settle: int | None
    others: dict[str, dict[str, float]] = Field(default_factory=dict)


class PerplexityComparison(Record):
    """Held-out perplexity.

    Attributes:
        start, twin, arm: perplexities; `start` None where it was not scored.
        rise_percent: of the arm's over the twin's; `ci95_percent` its interval over sequences, paired.
        detectable_rise_percent: smallest rise that this text would show at 80% power.
        budget_percent: None: not judged.
        sequences_to_settle: as `items_to_settle` of a task.
    """

    num_sequences: int
    num_tokens: int
    start: float | None
    twin: float
    arm: float
    rise_percent: float
    ci95_percent: Interval
    detectable_rise_percent: float
    budget_percent: float | None
    verdict: Verdict | None
    sequences_to_settle: int | None


class TrainingComparison(Record):
    """From the start model to the arm as deployed, over the items of all tasks: what training and quantization lost.

    Attributes:
        asked: whether the recipe gives a budget, and so whether the verdict counts; else it is only said.
    """

    num_items: int
    drop_pp: float
    ci95_pp: Interval
    budget_pp: float
    asked: bool
    verdict: Verdict


class ArmComparison(Record):
    """An arm against its twin; `verdict` is the worst of the tasks', of perplexity's and, where it counts, of training's.

    Attributes:
        perplexity: None where the two read no text.
        training: None where the start model was not scored.
    """

    tasks: list[TaskComparison]
    perplexity: PerplexityComparison | None = None
    training: TrainingComparison | None = None
    verdict: Verdict
    conditional_on: str


class Cost(Record):
    """Of training an arm, the trunk included."""

    seconds: float
    peak_memory_bytes: int


class OverPtq(Record):
    """A trained arm against one of the same format that was calibrated alone, from the same twin. Intervals of both measures
    hold together at 95 %, over seeds too where there are several.

    Attributes:
        formats: of both, in words.
        accuracy_pp: of the trained arm minus that of the other, over the items of all tasks.
        perplexity_percent: of the trained arm over that of the other, below 0 where training helps; None where they read
            no common text, as then its interval.
        answer: in words.
        has_twin: whether it is quantization alone that differs; else the calibrated arm is made from the start model, and
            what training brought is in the difference.
    """

    formats: str
    qat: str
    ptq: str
    num_items: int
    accuracy_pp: float
    ci_accuracy_pp: Interval
    perplexity_percent: float | None
    ci_perplexity_percent: Interval | None
    answer: str
    has_twin: bool = True


class Pair(Record):
    """An arm and its BF16 twin, compared.

    Attributes:
        method: how the arm came about, "qat" or "ptq"; its twin is what it was made from then.
        loss_ape_percent: mean |loss of the arm - loss of the twin| / loss of the twin, in percent, over "all_steps" and
            "after_switch"; empty where training records are missing.
        perplexity: of held-out text: "start", "twin", "arm" and "arm_off", as far as they are known.
        cost: "twin" and "arm".
        format: that it quantizes to, several joined by "+"; empty where nothing says so.
        sizes: bytes of the arm's weights on disk: "plain_bytes" and "quantized_bytes".
        mismatches: in what the two differ besides quantization; only where they were compared anyway.
    """

    arm: str
    twin: str
    method: Literal["qat", "ptq"] = "qat"
    comparison: ArmComparison
    loss_ape_percent: dict[str, float]
    perplexity: dict[str, float]
    cost: dict[str, Cost]
    sizes: dict[str, int]
    coverage: str | None
    mismatches: list[str]
    format: str = ""


class StudyComparison(Record):
    """comparison.json; `verdict` is the worst of the arms', None where no arm has a twin."""

    study: str = ""
    verdict: Verdict | None
    pairs: list[Pair]
    over_ptq: list[OverPtq] = Field(default_factory=list)
