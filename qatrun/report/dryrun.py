"""What `qatrun check` prints: timeline, coverage, tokens, memory, disk, the eval plan and what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from qatrun.records.dryrun import DryRun, DryRunArm
from qatrun.report.grid import Grid
from qatrun.report.stages import clock_time
from qatrun.text import readable_size


def dry_run(plan: DryRun) -> RenderableType:
    """The dry run of a recipe."""
    parameters = f", {plan.num_parameters:,} parameters" if plan.num_parameters else ""
    parts: list[RenderableType] = [Text(f"{plan.name}: {plan.model}{parameters} -> {plan.folder}", style="bold")]
    if plan.seeds:
        seeds = ", ".join(map(str, plan.seeds))
        parts.append(Text(f"seeds {seeds}, each a study of its own: what follows is for one of them"))
    shared = f", {plan.processes} processes together; memory is that of each" if plan.processes > 1 else ""
    parts.append(Text(f"runs on {plan.runs_on}{shared}"))
    parts += [_arm(arm) for arm in plan.arms]
    if plan.disk_bytes is not None:
        sizes = ", ".join(f"{phase} {readable_size(size)}" for phase, size in plan.disk_bytes.items())
        parts.append(Text(f"disk, about: {sizes} (estimate)"))
    parts += [Text.assemble(("warning: ", "yellow"), warning) for warning in plan.warnings]
    parts += [
        Text(),
        _tasks(plan),
        Text(f"detects: smallest drop seen at 80% power if {plan.assumed_discordance:.0%} of the items flip"),
        *_too_few(plan),
    ]
    if plan.training_seconds is not None:
        parts.append(
            Text(f"training takes about {clock_time(plan.training_seconds)} here, scoring not counted (timed)")
        )
    return Group(*parts)


def _too_few(plan: DryRun) -> Iterator[Text]:
    """Tasks whose items cannot tell a drop as large as the budget, and how many could."""
    for task in plan.tasks:
        detects = task.detectable_drop_pp
        if task.num_items and detects and detects > task.budget_pp:
            enough = math.ceil(task.num_items * (detects / task.budget_pp) ** 2)
            few = f"{task.name}: {task.num_items:,} items cannot judge a budget of {task.budget_pp:g} pp"
            yield Text(f"{few}; about {enough:,} could", style="yellow")


def _arm(arm: DryRunArm) -> RenderableType:
    text = Text.assemble("\n", (arm.name, "bold cyan"), f" (twin: {arm.twin})" if arm.twin else "")
    passes = f": about {arm.tokens / arm.text_tokens:.2g} passes over the text" if arm.text_tokens else ""
    lines = [f"lr {arm.learning_rate:g}; {arm.tokens_per_step:,} tokens a step, {arm.tokens:,} in all{passes}"]
    if arm.teacher is not None:
        lines.append(arm.teacher)
    if arm.method == "ptq":
        lines = ["no step is trained"]
    elif arm.switch_step is None:
        lines.insert(0, f"steps 1-{arm.steps} BF16, the first {arm.warmup_steps} in the shared trunk")
    else:
        lines.insert(0, f"steps 1-{arm.switch_step} BF16, switch, steps {arm.switch_step + 1}-{arm.steps} QAT")
    lines += arm.calibration
    if arm.roles:
        lines += [*arm.roles, arm.coverage or "coverage unknown", *arm.runs]
        if arm.export:
            lines.append(f"in the end exported as {', '.join(arm.export)}, proven equal and scored again")
    if arm.memory_bytes:
        sizes = ", ".join(f"{phase} {readable_size(size)}" for phase, size in arm.memory_bytes.items())
        lines.append(f"memory, about: {sizes} (estimate)")
    return text.append("\n  " + "\n  ".join(lines))


def _tasks(plan: DryRun) -> Grid:
    table = Grid("", "task", "shots", "metric", "items", "budget pp", "detects pp", "source")
    for task in plan.tasks:
        unknown = task.missing is not None
        table.add_row(
            Text(task.name),
            str(task.num_fewshot),
            Text("?" if unknown else task.metric),
            f"{task.num_items:,}" if task.num_items else "?",
            f"{task.budget_pp:g}",
            f"{task.detectable_drop_pp:.2f}" if task.detectable_drop_pp else "?",
            Text("missing" if unknown else task.source),
        )
    return table
