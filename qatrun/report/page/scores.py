"""What quantization cost, against its budget; and where it went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qatrun.records.comparison import Pair, TaskComparison
from qatrun.records.diagnosis import ArmDiagnosis, Effect
from qatrun.report.page.content import StudyContent
from qatrun.report.page.figure import Figure, Key, arm_keys
from qatrun.report.page.forest import Group, Mark, forest_figure
from qatrun.report.page.table import (
    Table,
    Written,
    bounds,
    difference,
    estimate,
    percent,
    printable,
    signed,
    signed_range,
    table,
    written,
)

VARIANTS = {
    "start": "start",
    "twin": "BF16 twin",
    "ptq": "twin, PTQ",
    "off": "quantizers off",
    "on": "quantizers on",
    "fresh": "on, fresh scales",
}


def scores_figure(content: StudyContent) -> Figure | None:
    """Drop of every arm on every task with its interval, against the budget; None where nothing was compared."""
    tasks = _compared(content)
    if not tasks:
        return None
    indices = {arm.name: arm.index for arm in content.arms}
    groups = [
        Group(
            printable(name),
            [_drop_mark(pair, task, indices[pair.arm]) for pair, task in tasks if task.task == name],
            next(task.budget_pp for _, task in tasks if task.task == name),
        )
        for name in dict.fromkeys(task.task for _, task in tasks)
    ]
    pair, worst = max(tasks, key=lambda each: each[1].drop_pp)
    title = (
        f"Largest drop: {printable(pair.arm)} on {printable(worst.task)}, {signed(worst.drop_pp)} pp "
        f"(95% interval {signed_range(worst.ci95_pp)}) against a budget of {worst.budget_pp:g} pp"
    )
    rows = [
        (
            *(pair.arm, pair.twin, task.task, task.drop_pp, *task.ci95_pp),
            *(task.budget_pp, task.verdict, task.detectable_drop_pp, task.mcnemar_p),
        )
        for pair, task in tasks
    ]
    columns = ("arm", "twin", "task", "drop pp", "low pp", "high pp", "budget pp", "verdict", "detects pp", "McNemar p")
    return forest_figure(
        "scores",
        title,
        "Drop from the BF16 twin to the arm with quantizers on; bars are paired 95% intervals over the items that both "
        "answered. Within budget: the whole bar lies left of the budget's mark.",
        groups,
        "drop, percentage points of accuracy",
        table(columns, rows),
        legend=(*arm_keys({pair.arm: indices[pair.arm] for pair in content.pairs}), Key("budget", "┆", "plain")),
        zero="right of 0: the arm is worse",
    )


def effects_table(content: StudyContent) -> Table:
    """The parts of every arm's drop, a row an effect over all tasks and one for each task."""
    columns = (
        *("arm", "effect", "task", "from", "to", "drop pp", "log-likelihood shift", "answer text shift a token"),
        "log-perplexity shift",
    )
    rows = [_effect_row(name, "all", effect) for name, arm in content.diagnosed.items() for effect in arm.effects]
    rows += [
        _effect_row(name, task, effect)
        for name, arm in content.diagnosed.items()
        for task, effects in arm.tasks.items()
        for effect in effects
    ]
    return table(
        columns,
        rows,
        "What is lost from one model to another, with paired 95% intervals. Off and on: the arm's quantizers; fresh: on, "
        "with scales taken anew from the text at hand; ptq: the twin, quantized without training",
        "attribution",
    )


def _compared(content: StudyContent) -> list[tuple[Pair, TaskComparison]]:
    return [(pair, task) for pair in content.pairs for task in pair.comparison.tasks]


def _drop_mark(pair: Pair, task: TaskComparison, index: int) -> Mark:
    numbers = f"{signed(task.drop_pp)} [{signed_range(task.ci95_pp)}]"
    title = f"{pair.arm} on {task.task}: drop {numbers} pp, budget {task.budget_pp:g}, {task.verdict}"
    return Mark(task.drop_pp, index, task.ci95_pp, text=f"{numbers} {task.verdict}", title=printable(title))


def _effect_row(arm: str, task: str, effect: Effect) -> tuple[Any, ...]:
    return (
        *(arm, effect.name, task, effect.source, effect.target, estimate(effect.drop_pp, effect.ci95_pp)),
        estimate(effect.loglikelihood, effect.ci95_loglikelihood, 3),
        estimate(effect.text_loglikelihood, effect.ci95_text_loglikelihood, 3),
        difference(effect.log_perplexity, 4),
    )


def score_table(content: StudyContent) -> Table:
    """Accuracies in percent and what the comparison says of them, a row an arm and task."""
    columns = ("arm", "task", "verdict", "start", "BF16 twin", "on", "off", "drop pp", "95% interval", "budget pp")
    rows = [
        (
            *(pair.arm, task.task, task.verdict),
            *(percent(accuracy) for accuracy in (task.start, task.twin, task.arm, task.arm_off)),
            *(difference(task.drop_pp), bounds(task.ci95_pp), task.budget_pp),
        )
        for pair, task in _compared(content)
    ]
    rows += [
        (
            pair.arm,
            f"{task.task} {metric}",
            None,
            *(percent(values.get(m)) for m in ("start", "twin", "arm")),
            *[None] * 4,
        )
        for pair, task in _compared(content)
        for metric, values in task.others.items()
    ]
    rows += [
        (
            *(pair.arm, "held-out perplexity", text.verdict),
            *(written(value, ".3f") for value in (text.start, text.twin, text.arm, pair.perplexity.get("arm_off"))),
            *(difference(text.rise_percent, unit=" %"), bounds(text.ci95_percent, unit=" %")),
            None if text.budget_percent is None else Written(f"{text.budget_percent:g} %", {"": text.budget_percent}),
        )
        for pair in content.pairs
        if (text := pair.comparison.perplexity) is not None
    ]
    return table(columns, rows, "Accuracy in percent; on and off are the arm's quantizers")


def evidence_table(content: StudyContent) -> Table:
    """What the drops rest on, a row an arm and task."""
    columns = (
        *("arm", "task", "metric", "shots", "items", "flips", "relative drop %", "McNemar p", "mean |Δll|"),
        *("detects pp", "to settle"),
    )
    rows = [
        (
            *(pair.arm, task.task, task.metric, task.num_fewshot, task.num_items),
            Written(
                f"{task.flips_to_wrong}↓ {task.flips_to_right}↑",
                {"to wrong": task.flips_to_wrong, "to right": task.flips_to_right},
            ),
            difference(task.drop_relative_percent),
            *(written(task.mcnemar_p, ".2g"), written(task.mean_abs_delta_loglikelihood, ".3f")),
            *(written(task.detectable_drop_pp, ".2f"), task.items_to_settle),
        )
        for pair, task in _compared(content)
    ]
    return table(
        columns,
        rows,
        "Evidence: items that flipped (↓ right in the twin, wrong in the arm; ↑ the other way round), mean change of the "
        "right answer's log-likelihood, the smallest drop that would have been seen, items that would settle it",
        "evidence",
    )


def cost_table(content: StudyContent) -> Table:
    """Perplexity, loss error, time, memory and size of every quantized arm."""
    columns = (
        *("arm", "perplexity start", "BF16 twin", "on", "off", "loss APE %", "seconds", "twin's seconds"),
        *("peak MiB", "plain MiB", "quantized MiB"),
    )
    rows = []
    for pair in content.pairs:
        costs, sizes = [pair.cost.get(who) for who in ("arm", "twin")], pair.sizes
        seconds = [cost.seconds if cost else None for cost in costs]
        peak = costs[0].peak_memory_bytes if costs[0] else None
        num_bytes = [peak, sizes.get("plain_bytes"), sizes.get("quantized_bytes")]
        rows.append(
            (
                pair.arm,
                *(written(pair.perplexity.get(key), ".3f") for key in ("start", "twin", "arm", "arm_off")),
                written(pair.loss_ape_percent.get("after_switch"), ".3f"),
                *(None if value is None else round(value, 1) for value in seconds),
                *(None if value is None else round(value / 2**20, 1) for value in num_bytes),
            )
        )
    return table(columns, rows, "Perplexity of held-out text, and what training took", "arms")


def variants_table(diagnosed: Mapping[str, ArmDiagnosis]) -> Table:
    """The models that the diagnosis scored on the same items, a row an arm and task; no rows where it kept no scores."""
    rows: list[tuple[Any, ...]] = []
    for name, arm in diagnosed.items():
        rows += [
            (name, f"{task} %", *(percent(found.get(key)) for key in VARIANTS)) for task, found in arm.accuracy.items()
        ]
        rows += [
            (name, label, *(written(found.get(variant), form) for variant in VARIANTS))
            for found, label, form in (
                (arm.perplexity, "held-out perplexity", ".3f"),
                (arm.probe, "forgetting probe, nats", ".4f"),
            )
            if found
        ]
    return table(
        ("arm", "score", *VARIANTS.values()),
        rows,
        "Every model on the same items; the forgetting probe is the KL from the start model on held-out text",
        "models",
    )
