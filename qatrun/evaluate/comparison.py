"""Arm against twin, task by task: the drop, how sure it is, and the verdict against the budget.

Pure: scores in, numbers out; printing is elsewhere. Accuracies are fractions; fields ending in `_pp` are percentage
points.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np

from qatrun.errors import MismatchError, Problem
from qatrun.evaluate import paired
from qatrun.evaluate.paired import Verdict
from qatrun.evaluate.scores import Scores, TaskScore

CONDITIONAL_ON = "these checkpoints, one training seed, these items: another seed may differ by more than the interval"
_SEVERITY: tuple[Verdict, ...] = ("within", "inconclusive", "exceeds")


@dataclass(frozen=True)
class TaskComparison:
    """One task.

    Attributes:
        start: accuracy of the model before training, in [0, 1]; None where it was not scored.
        twin: accuracy of the BF16 twin.
        arm: accuracy of the arm, quantizers on.
        arm_off: accuracy of the arm with its quantizers off; None where it was not scored.
        drop_pp: twin minus arm.
        drop_relative_percent: the drop in percent of the twin's accuracy; None where the twin gets nothing right.
        ci95_pp: two-sided 95% interval of `drop_pp` over items (`paired.drop_interval`).
        mcnemar_p: exact, two-sided.
        flips_to_wrong: items right in the twin and wrong in the arm; `flips_to_right` the other way round.
        mean_abs_delta_loglikelihood: nats, of the right answer, arm against twin.
        detectable_drop_pp: smallest drop that this many items would show at 80% power, at the observed rate of flips.
        items_to_settle: about how many items would settle it; None where it is settled, or the drop equals the budget.
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
    ci95_pp: tuple[float, float]
    mcnemar_p: float
    flips_to_wrong: int
    flips_to_right: int
    mean_abs_delta_loglikelihood: float
    detectable_drop_pp: float
    budget_pp: float
    verdict: Verdict
    items_to_settle: int | None


@dataclass(frozen=True)
class Comparison:
    """An arm against its twin on every task; `verdict` is the worst of the tasks'."""

    tasks: tuple[TaskComparison, ...]
    verdict: Verdict
    conditional_on: str = CONDITIONAL_ON

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        saved = json.loads(text)
        tasks = tuple(TaskComparison(**{**task, "ci95_pp": tuple(task["ci95_pp"])}) for task in saved["tasks"])
        return cls(tasks, saved["verdict"], saved["conditional_on"])

    def to_csv(self) -> str:
        """One row per task under a header; the interval is two columns, None an empty cell."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _csv_columns(), lineterminator="\n")
        writer.writeheader()
        for task in self.tasks:
            row = asdict(task)
            row["ci95_low_pp"], row["ci95_high_pp"] = row.pop("ci95_pp")
            writer.writerow(row)
        return text.getvalue()


def compare(
    start: Scores | None, twin: Scores, arm: Scores, arm_off: Scores | None, budgets: Mapping[str, float]
) -> Comparison:
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
    tasks = tuple(
        _compare_task(
            score,
            arm.tasks[name],
            start=None if start is None else start.tasks[name].accuracy,
            arm_off=None if arm_off is None else arm_off.tasks[name].accuracy,
            budget_pp=budgets[name],
        )
        for name, score in twin.tasks.items()
    )
    return Comparison(tasks, max((task.verdict for task in tasks), key=_SEVERITY.index))


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
    arm_order = np.argsort(arm.items.item_id)[np.argsort(np.argsort(twin.items.item_id))]
    flips = paired.count_flips(twin.items.correct, arm.items.correct[arm_order])
    interval, budget = paired.drop_interval(flips), budget_pp / 100.0
    verdict = paired.judge(interval, budget)
    shift = np.abs(arm.items.loglikelihood[arm_order] - twin.items.loglikelihood)
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
        ci95_pp=(100.0 * interval[0], 100.0 * interval[1]),
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


def _csv_columns() -> list[str]:
    columns: list[str] = []
    for field in fields(TaskComparison):
        columns += ["ci95_low_pp", "ci95_high_pp"] if field.name == "ci95_pp" else [field.name]
    return columns
