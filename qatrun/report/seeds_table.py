"""What the seeds of a study say together, as tables: on the terminal, and as plain text in a file."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from qatrun.records.seeds import Answer, Seeds, TaskOfSeeds
from qatrun.records.values import Verdict
from qatrun.report.grid import Grid
from qatrun.report.over_ptq import over_ptq_lines
from qatrun.report.tables import VERDICT_STYLES, percent, plain_text, training_line, verdict_line
from qatrun.text import interval

EFFECT_STYLES: dict[Answer, str] = {"helps": "green", "no effect shown": "yellow", "hurts": "red"}


def seeds_table(summary: Seeds) -> RenderableType:
    """The summary of a study, as in seeds.json: every arm over all tasks, task by task, where the intervals come from, and
    the contrasts."""
    parts: list[RenderableType] = [_arms(summary), Text(), _tasks(summary)]
    if len(summary.seeds) > 1:
        parts += [Text(), _sources(summary)]
    if summary.contrasts:
        parts += [Text(), _contrasts(summary)]
    return Group(*parts, Text(), *_footer(summary))


def seeds_text(summary: Seeds) -> str:
    """The same as plain text of 110 columns, for a file."""
    return plain_text(seeds_table(summary))


def _arms(summary: Seeds) -> Grid:
    title = f"{summary.study}: all tasks together, {_seeds(summary)}"
    table = Grid(title, "arm", "accuracy", "sd", "drop pp", "95% interval", "loss APE", "verdict")
    table.add_row("start", f"{100 * summary.start.all_tasks.accuracy:.2f}", "", "", "", "", "")
    for name, arm in summary.arms.items():
        found, apes = arm.all_tasks, arm.loss_apes
        table.add_row(
            Text(name),
            f"{100 * found.mean:.2f}",
            percent(found.sd),
            *_drop(found),
            f"{_mean(apes):.3f}%" if apes else "-",
            _verdict(arm.verdict),
        )
    return table


def _tasks(summary: Seeds) -> Grid:
    table = Grid("task by task", "task", "arm", "accuracy", "sd", "drop pp", "95% interval", "budget", "verdict")
    for task in summary.start.tasks:
        for name, arm in summary.arms.items():
            found = arm.tasks[task]
            budget = f"{found.budget_pp:g}" if arm.twin is not None else "-"
            table.add_row(
                *(Text(task), Text(name), f"{100 * found.mean:.2f}", percent(found.sd)),
                *(*_drop(found), budget, _verdict(found.verdict)),
            )
    for name, arm in summary.arms.items():
        if arm.text is not None:
            limit = arm.text.budget_percent
            table.add_row(
                *(Text("perplexity"), Text(name), f"{_mean(arm.perplexity):.4g}", ""),
                *(f"{arm.text.rise_mean_percent:+.2f}%", interval(arm.text.rise_ci95_percent)),
                *("-" if limit is None else f"{limit:g}%", _verdict(arm.text.verdict)),
            )
    return table


def _sources(summary: Seeds) -> Grid:
    """Over all tasks: the drop of every seed, and how far items alone and seeds alone leave it open."""
    title = (
        "drop pp over all tasks: over items (other questions) and over seeds (other runs) it is open in different ways"
    )
    table = Grid(title, "arm", "over items alone", "over seeds alone", "per seed")
    for name, arm in summary.arms.items():
        found = arm.all_tasks
        if found.drop_pp and found.drop_ci95_items_pp and found.drop_ci95_seeds_pp:
            alone = (interval(found.drop_ci95_items_pp), interval(found.drop_ci95_seeds_pp))
            table.add_row(Text(name), *alone, " ".join(f"{drop:+.2f}" for drop in found.drop_pp))
    return table


def _contrasts(summary: Seeds) -> Grid:
    title = "contrasts: accuracy of the first minus that of the second, and of their training losses"
    table = Grid(title, "contrast", "pp", "95% interval", "loss", "APE", "answer")
    for contrast in summary.contrasts:
        apes, signed = contrast.loss_ape_percent, contrast.loss_difference_percent
        answer: str = contrast.effect
        if answer == "no effect shown":
            answer += f" (could be up to {max(map(abs, contrast.ci95_pp)):.2f} pp)"
        table.add_row(
            Text.assemble(contrast.name, (f"\n{contrast.a} against {contrast.b}", "dim")),
            f"{contrast.difference_pp:+.2f}",
            interval(contrast.ci95_pp),
            f"{_mean(signed):+.3f}%" if signed else "-",
            f"{_mean(apes):.3f}%" if apes else "-",
            Text(answer, style=EFFECT_STYLES[contrast.effect]),
        )
    return table


def _footer(summary: Seeds) -> list[RenderableType]:
    lines: list[RenderableType] = [Text(line) for line in over_ptq_lines(summary.over_ptq)]
    if summary.verdict is not None:
        lines.append(verdict_line(summary.verdict, "the worst of the arms and tasks"))
    lines += [training_line(name, arm.training) for name, arm in summary.arms.items() if arm.training is not None]
    if len(summary.seeds) > 1:
        lines.append(
            Text(
                "Verdicts and answers use the interval over items and seeds together (the two half widths in quadrature). "
                "Over items alone it would hold for these seeds only, over seeds alone for these items only. "
                f"With {len(summary.seeds)} seeds it is wide where seeds differ: more of them narrow it most."
            )
        )
    else:
        lines.append(Text("One training seed: intervals are over items, and another seed may differ by more."))
    if summary.contrasts:
        lines.append(Text("Every contrast is asked by itself: of twenty without any effect, about one would show one."))
    return lines


def _seeds(summary: Seeds) -> str:
    numbers = ", ".join(map(str, summary.seeds))
    return f"seeds {numbers}" if len(summary.seeds) > 1 else f"seed {numbers}"


def _drop(found: TaskOfSeeds) -> tuple[str, str]:
    if found.drop_mean_pp is None or found.drop_ci95_pp is None:
        return "-", "-"
    return f"{found.drop_mean_pp:+.2f}", interval(found.drop_ci95_pp)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _verdict(verdict: Verdict | None) -> Text:
    return Text("-") if verdict is None else Text(verdict, style=VERDICT_STYLES[verdict])
