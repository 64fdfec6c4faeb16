"""Arm against twin, task by task and on held-out text: what is lost, how sure it is, and the verdict against the budget.

Pure: scores in, numbers out; printing is elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from qatrun.errors import MismatchError, Problem
from qatrun.evaluate import paired
from qatrun.evaluate.attribution import HELD_OUT, rise
from qatrun.evaluate.paired import Bounds, Flips, Interval, Rate
from qatrun.evaluate.scores import Scores, TaskScore
from qatrun.evaluate.text import perplexity
from qatrun.recipe.schema import DEFAULT_BUDGET_PP, PERPLEXITY, TRAINING
from qatrun.records.comparison import ArmComparison, PerplexityComparison, TaskComparison, TrainingComparison
from qatrun.records.export import EngineMatch, TaskMatch
from qatrun.records.scores import TextScores
from qatrun.records.values import Verdict

CONDITIONAL_ON = "these checkpoints, one training seed, these items: another seed may differ by more than the interval"
TRAINING_PP = 3.0  # from which a loss in training is said where no budget is given


@dataclass(frozen=True)
class Scored:
    """What a model answered and read; `texts` is None of a folder that only holds answers."""

    scores: Scores
    texts: TextScores | None = None


def compare(
    start: Scored | None, twin: Scored, arm: Scored, arm_off: Scores | None, budgets: Mapping[str, float | None]
) -> ArmComparison:
    """Compare an arm with its twin on the items that both answered and the text that both read.

    Args:
        start: of the model before training, where it was scored.
        arm_off: of the arm with its quantizers off, where it was scored.
        budgets: task -> largest acceptable drop, percentage points, one for each of the twin's tasks; PERPLEXITY ->
            largest acceptable rise, percent; TRAINING -> largest acceptable drop from the start model.
    Raises:
        MismatchError: not the same tasks, few-shot examples or items; names the difference.
    """
    of_start = None if start is None else start.scores
    others = {"start": of_start, "arm": arm.scores, "arm with quantizers off": arm_off}
    problems = [
        problem
        for name, scores in others.items()
        if scores is not None
        for problem in _unpaired(twin.scores, scores, name)
    ]
    if problems:
        raise MismatchError(problems)
    flips = {task: _flips([(score, arm.scores.tasks[task])]) for task, score in twin.scores.tasks.items()}
    drops: dict[str, tuple[Bounds, float]] = {
        task: (partial(_drop_interval, of_task), float(budgets[task] or 0.0) / 100.0) for task, of_task in flips.items()
    }
    text, limit = _rise(twin, arm), budgets.get(PERPLEXITY)
    if text is not None and limit is not None:
        drops[PERPLEXITY] = (text.interval, math.log1p(limit / 100.0))
    lost = (
        None
        if start is None
        else _flips([(score, arm.scores.tasks[task]) for task, score in start.scores.tasks.items()])
    )
    asked = budgets.get(TRAINING)
    if lost is not None and asked is not None:
        drops[TRAINING] = (partial(_drop_interval, lost), asked / 100.0)
    verdicts = paired.judge(drops)
    worst = paired.worst_verdict(verdicts.values())
    assert worst is not None  # a recipe has a task
    return ArmComparison(
        tasks=[
            _compare_task(score, arm.scores.tasks[task], flips[task], drops[task][1], verdicts[task]).model_copy(
                update={
                    "start": None if start is None else start.scores.tasks[task].accuracy,
                    "arm_off": None if arm_off is None else arm_off.tasks[task].accuracy,
                    "others": _others(
                        {"start": start.scores if start else None, "twin": twin.scores, "arm": arm.scores}, task
                    ),
                }
            )
            for task, score in twin.scores.tasks.items()
        ],
        perplexity=None if text is None else _compare_texts(start, twin, arm, text, limit, verdicts.get(PERPLEXITY)),
        training=None
        if lost is None
        else compare_training(lost.num_items, lost.drop, partial(_drop_interval, lost), asked, verdicts.get(TRAINING)),
        verdict=worst,
        conditional_on=CONDITIONAL_ON,
    )


def _others(models: Mapping[str, Scores | None], task: str) -> dict[str, dict[str, float]]:
    """Metric that decides nothing -> model -> its mean."""
    given = {model: scores.tasks[task].others for model, scores in models.items() if scores is not None}
    names = dict.fromkeys(name for others in given.values() for name in others)
    return {name: {model: others[name] for model, others in given.items() if name in others} for name in names}


def match_items(engine: str, scored: Scores, exported: Scores, budgets: Mapping[str, float | None]) -> EngineMatch:
    """Compare what an engine answered with what the arm did when it was scored, on the same items.

    Args:
        budgets: task -> largest acceptable drop, percentage points; 1 where there is none.
    Raises:
        MismatchError: not the same tasks or items; names the difference.
    """
    if problems := _unpaired(scored, exported, engine):
        raise MismatchError(problems)
    tasks: list[TaskMatch] = []
    drops: dict[str, tuple[Bounds, float]] = {}
    for name, task in scored.tasks.items():
        theirs = exported.tasks[name]
        flips = _flips([(task, theirs)])
        both = (
            theirs.items.choice_loglikelihoods[theirs.items.places(task.items.item_id)],
            task.items.choice_loglikelihoods,
        )
        shift = float(np.nanmax(np.abs(both[0] - both[1])))
        if shift:  # the very same answers need no statistics
            drops[name] = partial(_drop_interval, flips), (budgets.get(name) or DEFAULT_BUDGET_PP) / 100.0
        tasks.append(
            TaskMatch(
                task=name,
                items=task.num_items,
                scored=task.accuracy,
                engine=theirs.accuracy,
                flips_to_wrong=flips.to_wrong,
                flips_to_right=flips.to_right,
                max_abs_delta_loglikelihood=shift,
            )
        )
    verdict = paired.worst_verdict(paired.judge(drops).values()) if drops else "within"
    assert verdict is not None  # there is a task
    return EngineMatch(engine=engine, tasks=tasks, verdict=verdict)


def setting_mismatches(twin: Scores, arm: Scores) -> list[Problem]:
    """Evaluation settings in which two models' scores differ, one problem each; empty where they may be compared."""
    keys = dict.fromkeys((*twin.settings, *arm.settings))
    return [
        Problem(
            f"the twin was scored with {twin.settings.get(key)!r}, the arm with {arm.settings.get(key)!r}",
            f"eval.{key}",
        )
        for key in keys
        if twin.settings.get(key) != arm.settings.get(key)
    ]


def _flips(pairs: Sequence[tuple[TaskScore, TaskScore]]) -> Flips:
    """Of all items of these tasks together, before and after."""
    counted = [
        paired.count_flips(before.items.correct, after.items.correct[after.items.places(before.items.item_id)])
        for before, after in pairs
    ]
    return Flips(*(sum(getattr(flips, name) for flips in counted) for name in ("to_wrong", "to_right", "num_items")))


def _drop_interval(flips: Flips, confidence: float) -> Interval:
    return paired.drop_interval(flips, confidence=confidence)


def _compare_task(twin: TaskScore, arm: TaskScore, flips: Flips, budget: float, verdict: Verdict) -> TaskComparison:
    interval = paired.drop_interval(flips)
    shift = np.abs(arm.items.loglikelihood[arm.items.places(twin.items.item_id)] - twin.items.loglikelihood)
    return TaskComparison(
        task=twin.task,
        metric=twin.metric,
        num_fewshot=twin.num_fewshot,
        num_items=twin.num_items,
        start=None,
        twin=twin.accuracy,
        arm=arm.accuracy,
        arm_off=None,
        drop_pp=100.0 * flips.drop,
        drop_relative_percent=100.0 * flips.drop / twin.accuracy if twin.accuracy else None,
        ci95_pp=[100.0 * edge for edge in interval],
        mcnemar_p=paired.mcnemar_p(flips),
        flips_to_wrong=flips.to_wrong,
        flips_to_right=flips.to_right,
        mean_abs_delta_loglikelihood=float(shift.mean()),
        detectable_drop_pp=100.0 * paired.detectable_drop(flips.num_items, flips.discordance),
        budget_pp=100.0 * budget,
        verdict=verdict,
        items_to_settle=_to_settle(verdict, flips.num_items, flips.drop, interval, budget),
    )


def _rise(twin: Scored, arm: Scored) -> Rate | None:
    """Nats a token of held-out text; None where the two read none, or not the same."""
    before, after = (each.texts.texts.get(HELD_OUT) if each.texts else None for each in (twin, arm))
    return rise(before, after) if before and after and before.text == after.text else None


def _compare_texts(
    start: Scored | None, twin: Scored, arm: Scored, text: Rate, budget_percent: float | None, verdict: Verdict | None
) -> PerplexityComparison:
    perplexities = [
        perplexity(each.texts.texts[HELD_OUT].mean) if each and each.texts and HELD_OUT in each.texts.texts else None
        for each in (start, twin, arm)
    ]
    interval = text.interval()
    budget = 0.0 if budget_percent is None else math.log1p(budget_percent / 100.0)
    return PerplexityComparison(
        num_sequences=text.num_clusters,
        num_tokens=text.num_units,
        start=perplexities[0],
        twin=perplexities[1] or 0.0,
        arm=perplexities[2] or 0.0,
        rise_percent=_as_percent(text.mean),
        ci95_percent=[_as_percent(edge) for edge in interval],
        detectable_rise_percent=_as_percent(text.detectable()),
        budget_percent=budget_percent,
        verdict=verdict,
        sequences_to_settle=_to_settle(verdict, text.num_clusters, text.mean, interval, budget),
    )


def compare_training(
    num_items: int, drop: float, bounds: Bounds, asked: float | None, verdict: Verdict | None
) -> TrainingComparison:
    """What was lost from the start model to the arm, judged though nobody asked.

    Args:
        drop: of accuracy; `bounds` its intervals.
        asked: budget, percentage points; None: it is only said.
        verdict: where it was judged in a family already.
    """
    budget_pp = TRAINING_PP if asked is None else asked
    return TrainingComparison(
        num_items=num_items,
        drop_pp=100.0 * drop,
        ci95_pp=[100.0 * edge for edge in bounds(0.95)],
        budget_pp=budget_pp,
        asked=asked is not None,
        verdict=verdict or paired.judge({TRAINING: (bounds, budget_pp / 100.0)})[TRAINING],
    )


def _to_settle(verdict: Verdict | None, num: int, drop: float, interval: Interval, budget: float) -> int | None:
    return paired.items_to_settle(num, drop, interval, budget) if verdict == "inconclusive" else None


def _as_percent(nats: float) -> float:
    """A rise of log-perplexity as one of perplexity; infinite beyond what a float holds."""
    return 100.0 * (perplexity(nats) - 1.0)


def _unpaired(twin: Scores, other: Scores, name: str) -> list[Problem]:
    if twin.tasks.keys() != other.tasks.keys():
        return [Problem(f"the twin was scored on {', '.join(twin.tasks)}; the {name} on {', '.join(other.tasks)}")]
    problems = []
    for task, score in twin.tasks.items():
        difference = _task_difference(score, other.tasks[task], name)
        if difference:
            problems.append(Problem(difference, key=task))
    return problems


def _task_difference(twin: TaskScore, other: TaskScore, name: str) -> str | None:
    for setting in ("metric", "num_fewshot"):
        if getattr(twin, setting) != getattr(other, setting):
            return f"{setting} is {getattr(twin, setting)} for the twin and {getattr(other, setting)} for the {name}"
    in_twin, in_other = set(twin.items.item_id.tolist()), set(other.items.item_id.tolist())
    if in_twin == in_other:
        return None
    only = sorted(in_twin ^ in_other)
    return (
        f"not the same items: {len(in_twin)} for the twin, {len(in_other)} for the {name}, "
        f"{len(in_twin & in_other)} in both (one that is not: {only[0]})"
    )
