"""What the seeds of a study say together, as tables: on the terminal, and as plain text in a file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from qatrun.report.grid import Grid
from qatrun.report.tables import VERDICT_STYLES

Row = Mapping[str, Any]
EFFECT_STYLES = {"helps": "green", "no effect shown": "yellow", "hurts": "red"}


def seeds_table(summary: Row) -> RenderableType:
    """The summary of a study, as in seeds.json: every arm over all tasks, task by task, where the intervals come from, and
    the contrasts."""
    parts: list[RenderableType] = [_arms(summary), Text(), _tasks(summary)]
    if len(summary["seeds"]) > 1:
        parts += [Text(), _sources(summary)]
    if summary["contrasts"]:
        parts += [Text(), _contrasts(summary)]
    return Group(*parts, Text(), *_footer(summary))


def seeds_text(summary: Row) -> str:
    """The same as plain text of 110 columns, for a file."""
    console = Console(file=io.StringIO(), width=110, no_color=True)
    console.print(seeds_table(summary))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _arms(summary: Row) -> Grid:
    title = f"{summary['study']}: all tasks together, {_seeds(summary)}"
    table = Grid(title, "arm", "accuracy", "sd", "drop pp", "95% interval", "loss APE", "verdict")
    table.add_row("start", f"{100 * summary['start']['all_tasks']['accuracy']:.2f}", "", "", "", "", "")
    for name, arm in summary["arms"].items():
        found, apes = arm["all_tasks"], (arm["loss_ape_percent"] or {}).get("after_switch")
        table.add_row(
            Text(name),
            f"{100 * found['mean']:.2f}",
            _points(found["sd"], 100),
            *_drop(found),
            f"{_mean(apes):.3f}%" if apes else "-",
            _verdict(arm["verdict"]),
        )
    return table


def _tasks(summary: Row) -> Grid:
    table = Grid("task by task", "task", "arm", "accuracy", "sd", "drop pp", "95% interval", "budget", "verdict")
    for task in summary["start"]["tasks"]:
        for name, arm in summary["arms"].items():
            found = arm["tasks"][task]
            budget = f"{found['budget_pp']:g}" if arm["twin"] is not None else "-"
            table.add_row(
                Text(task),
                Text(name),
                f"{100 * found['mean']:.2f}",
                _points(found["sd"], 100),
                *_drop(found),
                budget,
                _verdict(found["verdict"]),
            )
    return table


def _sources(summary: Row) -> Grid:
    """Over all tasks: the drop of every seed, and how far items alone and seeds alone leave it open."""
    title = (
        "drop pp over all tasks: over items (other questions) and over seeds (other runs) it is open in different ways"
    )
    table = Grid(title, "arm", "over items alone", "over seeds alone", "per seed")
    for name, arm in summary["arms"].items():
        found = arm["all_tasks"]
        if found["drop_pp"] is not None:
            intervals = (_interval(found["drop_ci95_items_pp"]), _interval(found["drop_ci95_seeds_pp"]))
            table.add_row(Text(name), *intervals, _signed(found["drop_pp"]))
    return table


def _contrasts(summary: Row) -> Grid:
    title = "contrasts: accuracy of the first minus that of the second, and of their training losses"
    table = Grid(title, "contrast", "pp", "95% interval", "loss", "APE", "answer")
    for contrast in summary["contrasts"]:
        apes, signed = contrast["loss_ape_percent"], contrast["loss_difference_percent"]
        answer = contrast["effect"]
        if answer == "no effect shown":
            answer += f" (could be up to {max(map(abs, contrast['ci95_pp'])):.2f} pp)"
        table.add_row(
            Text.assemble(contrast["name"], (f"\n{contrast['a']} against {contrast['b']}", "dim")),
            f"{contrast['difference_pp']:+.2f}",
            _interval(contrast["ci95_pp"]),
            f"{_mean(signed):+.3f}%" if signed else "-",
            f"{_mean(apes):.3f}%" if apes else "-",
            Text(answer, style=EFFECT_STYLES[contrast["effect"]]),
        )
    return table


def _footer(summary: Row) -> list[RenderableType]:
    verdict = summary["verdict"]
    lines: list[RenderableType] = []
    if verdict is not None:
        lines.append(
            Text.assemble(
                "verdict: ", (verdict, f"bold {VERDICT_STYLES[verdict]}"), " -- the worst of the arms and tasks"
            )
        )
    if len(summary["seeds"]) > 1:
        lines.append(
            Text(
                "Verdicts and answers use the interval over items and seeds together (the two half widths in quadrature). "
                "Over items alone it would hold for these seeds only, over seeds alone for these items only. "
                f"With {len(summary['seeds'])} seeds it is wide where seeds differ: more of them narrow it most."
            )
        )
    else:
        lines.append(Text("One training seed: intervals are over items, and another seed may differ by more."))
    if summary["contrasts"]:
        lines.append(Text("Every contrast is asked by itself: of twenty without any effect, about one would show one."))
    return lines


def _seeds(summary: Row) -> str:
    numbers = ", ".join(map(str, summary["seeds"]))
    return f"seeds {numbers}" if len(summary["seeds"]) > 1 else f"seed {numbers}"


def _drop(found: Row) -> tuple[str, str]:
    if found["drop_pp"] is None:
        return "-", "-"
    return f"{found['drop_mean_pp']:+.2f}", _interval(found["drop_ci95_pp"])


def _interval(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{low:+.2f} .. {high:+.2f}"


def _signed(values: Sequence[float]) -> str:
    return " ".join(f"{value:+.2f}" for value in values)


def _points(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{factor * value:.2f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _verdict(verdict: str | None) -> Text:
    return Text("-") if verdict is None else Text(verdict, style=VERDICT_STYLES[verdict])
