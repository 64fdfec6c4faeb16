"""Arm against twin, task by task: the drop, how sure it is, and the verdict against the budget.

Pure: scores in, numbers out; printing is elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qatrun.errors import MismatchError, Problem
from qatrun.evaluate import paired
from qatrun.evaluate.scores import Scores, TaskScore
from qatrun.recipe.schema import DEFAULT_BUDGET_PP
from qatrun.records.comparison import ArmComparison, TaskComparison
from qatrun.records.export import EngineMatch, TaskMatch

CONDITIONAL_ON = "these checkpoints, one training seed, these items: another seed may differ by more than the interval"


def compare(
    start: Scores | None, twin: Scores, arm: Scores, arm_off: Scores | None, budgets: Mapping[str, float]
) -> ArmComparison:
    """Compare an arm with its twin on the items that both answered.

    Args:
        start: scores of the model before training, where there are any.
        arm_off: scores of the arm with its quantizers off, where there are any.
        budgets: task -> largest acceptable drop, percentage points; one for each of the twin's tasks.
    Raises:
        MismatchError: not the same tasks, few-shot examples or items; names the difference.
    """
    others = {"start": start, "arm": arm, "arm with quantizers off": arm_off}
    problems = [
        problem for name, scores in others.items() if scores is not None for problem in _unpaired(twin, scores, name)
    ]
    if problems:
        raise MismatchError(problems)
    tasks = [
        _compare_task(
            score,
            arm.tasks[name],
            start=None if start is None else start.tasks[name].accuracy,
            arm_off=None if arm_off is None else arm_off.tasks[name].accuracy,
            budget_pp=budgets[name],
        )
        for name, score in twin.tasks.items()
    ]
    verdict = paired.worst_verdict(task.verdict for task in tasks)
    assert verdict is not None  # a recipe has a task
    return ArmComparison(tasks=tasks, verdict=verdict, conditional_on=CONDITIONAL_ON)


def match_items(engine: str, scored: Scores, exported: Scores, budgets: Mapping[str, float]) -> EngineMatch:
    """Compare what an engine answered with what the arm did when it was scored, on the same items.

    Args:
        budgets: task -> largest acceptable drop, percentage points; 1 where there is none.
    Raises:
        MismatchError: not the same tasks or items; names the difference.
    """
    if problems := _unpaired(scored, exported, engine):
        raise MismatchError(problems)
    tasks, verdicts = [], []
    for name, task in scored.tasks.items():
        theirs = exported.tasks[name]
        same = theirs.items.places(task.items.item_id)
        flips = paired.count_flips(task.items.correct, theirs.items.correct[same])
        shift = float(np.nanmax(np.abs(theirs.items.choice_loglikelihoods[same] - task.items.choice_loglikelihoods)))
        budget = budgets.get(name, DEFAULT_BUDGET_PP) / 100.0
        # The very same answers need no statistics.
        verdicts.append(paired.judge(paired.drop_interval(flips), budget) if shift else "within")
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
    verdict = paired.worst_verdict(verdicts)
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


def _compare_task(
    twin: TaskScore, arm: TaskScore, *, start: float | None, arm_off: float | None, budget_pp: float
) -> TaskComparison:
    same = arm.items.places(twin.items.item_id)
    flips = paired.count_flips(twin.items.correct, arm.items.correct[same])
    interval, budget = paired.drop_interval(flips), budget_pp / 100.0
    verdict = paired.judge(interval, budget)
    shift = np.abs(arm.items.loglikelihood[same] - twin.items.loglikelihood)
    return TaskComparison(
        task=twin.task,
        metric=twin.metric,
        num_fewshot=twin.num_fewshot,
        num_items=twin.num_items,
        start=start,
        twin=twin.accuracy,
        arm=arm.accuracy,
        arm_off=arm_off,
        drop_pp=100.0 * flips.drop,
        drop_relative_percent=100.0 * flips.drop / twin.accuracy if twin.accuracy else None,
        ci95_pp=[100.0 * edge for edge in interval],
        mcnemar_p=paired.mcnemar_p(flips),
        flips_to_wrong=flips.to_wrong,
        flips_to_right=flips.to_right,
        mean_abs_delta_loglikelihood=float(shift.mean()),
        detectable_drop_pp=100.0 * paired.detectable_drop(flips.num_items, flips.discordance),
        budget_pp=budget_pp,
        verdict=verdict,
        items_to_settle=paired.items_to_settle(flips.num_items, flips.drop, interval, budget)
        if verdict == "inconclusive"
        else None,
    )


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
