"""What a drop is made of: effects between models that answered the same items, and the rule that names the cause.

The models of an arm, each scored on the same items:

    start   before training                         off     the arm, quantizers off
    twin    trained in BF16                         on      the arm as deployed
    ptq     the twin, quantized after training      fresh   the arm, its scales calibrated anew
            with calibrated scales

The rule, on the items of all tasks together. An effect *matters* when the lower end of its 95 % interval is above a
threshold, in percentage points of accuracy or in nats of the right answer's log-probability among its choices, which shows
what accuracy is too coarse for:

    forgetting   start -> twin matters (3 pp or 0.10 nats): training without any quantizer lost it
    saturation   the run clipped, and both twin -> on and ptq -> on matter (1 pp or 0.02 nats, or 0.004 nats a token of the
                 right answer's own text): quantization with fitting scales does not cost this
    resolution   twin -> on matters (1 pp or 0.02 nats), and so does twin -> ptq: not even fitting scales hold what the
                 tensors carry
    divergence   twin -> on matters, and nothing above explains it

The answer's own text is the most sensitive of the three, since what all choices lose alike cancels among them. It is asked
only where something clipped: every coarse format costs some of it, fitting scales or not.

More than one may be found; none is a healthy run. Pure: arrays in, numbers out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qatrun.evaluate import paired
from qatrun.evaluate.scores import Scores, TaskScore
from qatrun.records.diagnosis import Effect


class Thresholds(NamedTuple):
    """Above which an effect matters: percentage points, nats among the choices, nats a token of the answer's text."""

    pp: float
    nats: float
    text_nats: float = np.inf


FORGETTING_MATTERS = Thresholds(3.0, 0.10)
QUANTIZATION_MATTERS = Thresholds(1.0, 0.02)
SATURATION_MATTERS = Thresholds(1.0, 0.02, text_nats=0.004)

UNKNOWN = (-np.inf, np.inf)  # the interval of a single item

# name -> (from, to); a positive drop is a loss on the way.
EFFECTS: Mapping[str, tuple[str, str]] = {
    "training": ("start", "twin"),
    "whole": ("twin", "on"),
    "ptq": ("twin", "ptq"),
    "beyond ptq": ("ptq", "on"),
    "forgetting": ("start", "off"),
    "quantization": ("off", "on"),
    "stale scale": ("fresh", "on"),
}


def effects(
    models: Mapping[str, Scores], log_perplexity: Mapping[str, float], tasks: tuple[str, ...] | None = None
) -> dict[str, Effect]:
    """Every effect between models that are there, by name.

    Args:
        models: "start", "twin", "ptq", "off", "on", "fresh" -> scores, as far as there are any; an effect is over the items
            that both of its models answered.
        log_perplexity: the same -> nats per token of held-out text.
        tasks: pooled; None: all.
    """
    return {
        name: _effect(name, source, target, models, log_perplexity, tasks)
        for name, (source, target) in EFFECTS.items()
        if source in models and target in models
    }


def findings(found: Mapping[str, Effect], *, clipped: bool) -> tuple[str, ...]:
    """The causes that the rule names, most basic first; none for a healthy run.

    Args:
        found: effects over all tasks.
        clipped: whether training recorded a tensor that clipped (as the saturation alarm has it).
    """

    def matters(thresholds: Thresholds, *names: str) -> bool:
        return all(name in found and _matters(found[name], thresholds) for name in names)

    causes = ["forgetting"] if matters(FORGETTING_MATTERS, "training") else []
    if clipped and matters(SATURATION_MATTERS, "whole", "beyond ptq"):
        causes.append("saturation")
    if matters(QUANTIZATION_MATTERS, "whole", "ptq"):
        causes.append("resolution")
    if matters(QUANTIZATION_MATTERS, "whole") and not {"saturation", "resolution"} & set(causes):
        causes.append("divergence")
    return tuple(causes)


def _matters(effect: Effect, thresholds: Thresholds) -> bool:
    """Whether it is surely above any of them."""
    surely = effect.ci95_pp[0], effect.ci95_loglikelihood[0], effect.ci95_text_loglikelihood[0]
    return any(low > threshold for low, threshold in zip(surely, thresholds, strict=True))


def _effect(
    name: str,
    source: str,
    target: str,
    models: Mapping[str, Scores],
    log_perplexity: Mapping[str, float],
    tasks: tuple[str, ...] | None,
) -> Effect:
    before, after = models[source], models[target]
    chosen = tuple(before.tasks) if tasks is None else tasks
    pairs = [_in_one_order(before.tasks[task], after.tasks[task]) for task in chosen]
    correct, correct_after, nats, text_nats = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    # Of the items that both answered: one of the two answered no others.
    fewer = [min(before.tasks[task], after.tasks[task], key=lambda score: score.num_items) for task in chosen]
    text_nats = text_nats * len(text_nats) / sum(score.num_answer_tokens for score in fewer)
    flips = paired.count_flips(correct, correct_after)
    low, high = paired.drop_interval(flips)
    known = source in log_perplexity and target in log_perplexity
    return Effect(
        name=name,
        source=source,
        target=target,
        drop_pp=100 * flips.drop,
        ci95_pp=[100 * low, 100 * high],
        loglikelihood=float(nats.mean()),
        ci95_loglikelihood=list(paired.t_interval(nats) or UNKNOWN),
        text_loglikelihood=float(text_nats.mean()),
        ci95_text_loglikelihood=list(paired.t_interval(text_nats) or UNKNOWN),
        log_perplexity=log_perplexity[target] - log_perplexity[source] if known else None,
    )


def _in_one_order(before: TaskScore, after: TaskScore) -> tuple[npt.NDArray[Any], ...]:
    """(correct before, correct after, nats lost among the choices, of the answer's text), each [num_items], by name."""
    both = np.intersect1d(before.items.item_id, after.items.item_id, assume_unique=True)
    one, other = before.items.places(both), after.items.places(both)
    return (
        before.items.correct[one],
        after.items.correct[other],
        answer_log_probability(before)[one] - answer_log_probability(after)[other],
        before.items.loglikelihood[one] - after.items.loglikelihood[other],
    )


def accuracies(models: Mapping[str, Scores], task: str) -> dict[str, float]:
    """Model -> accuracy on the items of a task that all of them answered."""
    items = {name: scores.tasks[task].items for name, scores in models.items()}
    common = reduce(np.intersect1d, (of_model.item_id for of_model in items.values()))
    return {name: float(of_model.correct[of_model.places(common)].mean()) for name, of_model in items.items()}


def answer_log_probability(score: TaskScore) -> npt.NDArray[np.float64]:
    """[num_items] nats: of the right answer among the item's choices; of its text where there are no others."""
    choices = score.items.choice_loglikelihoods
    if choices.shape[1] == 1:
        return score.items.loglikelihood
    total: npt.NDArray[np.float64] = np.logaddexp.reduce(np.where(np.isnan(choices), -np.inf, choices), axis=1)
    return score.items.loglikelihood - total
