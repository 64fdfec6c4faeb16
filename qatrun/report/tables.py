"""Comparisons as tables: on the terminal, and as plain text in a file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from qatrun.layout import START
from qatrun.records.comparison import OverPtq, Pair, PerplexityComparison, TaskComparison, TrainingComparison
from qatrun.records.scores import ScoredModel
from qatrun.records.values import Verdict
from qatrun.report.exported import match_lines
from qatrun.report.grid import Grid
from qatrun.report.over_ptq import over_ptq_lines
from qatrun.text import interval, readable_size

VERDICT_STYLES = {"within": "green", "inconclusive": "yellow", "exceeds": "red"}


def comparison_table(pair: Pair, alarms: int = 0) -> RenderableType:
    """One arm against its twin: verdict and scores, the evidence, and what else is known.

    Args:
        alarms: raised while the two were trained; no verdict is green beside one.
    """
    tasks, arm, twin = pair.comparison.tasks, pair.arm, pair.twin
    quantized = any(task.arm_off is not None for task in tasks)
    off = ("off",) if quantized else ()
    start = ("start",) if twin != START else ()
    title = f"{arm} against {twin}" + (", which it was calibrated from" if pair.method == "ptq" else "")
    scores = Grid(title, "task", *start, twin, arm, *off, "drop pp", "95% interval", "verdict")
    evidence = Grid("", "task", "items", "rel.", "p", "flips", "|Δll|", "detects", "budget", "to settle")
    for task in tasks:
        cells = _score_cells(task, quantized)
        scores.add_row(cells[0], *cells[1 if start else 2 :])
        for metric, values in task.others.items():
            cells = _other_cells(metric, values, quantized)
            scores.add_row(cells[0], *cells[1 if start else 2 :])
        evidence.add_row(*_evidence_cells(task))
    if (text := pair.comparison.perplexity) is not None:
        cells = _perplexity_cells(text, pair.perplexity.get("arm_off"), quantized)
        scores.add_row(cells[0], *cells[1 if start else 2 :])
        evidence.add_row(*_text_evidence_cells(text))
    return Group(*_verdicts(pair, alarms), Text(), scores, Text(), evidence, Text(), *_footer(pair))


def comparison_text(pairs: Sequence[Pair], over_ptq: Sequence[OverPtq] = ()) -> str:
    """The same as plain text, for a file."""
    lines = [Text(line) for line in over_ptq_lines(over_ptq)]
    return plain_text(*(part for pair in pairs for part in (comparison_table(pair), "")), *lines)


def plain_text(*parts: RenderableType) -> str:
    """As it is printed on 110 columns without colours."""
    text = io.StringIO()
    console = Console(file=text, width=110, no_color=True)
    for part in parts:
        console.print(part)
    return text.getvalue()


def score_table(scored: ScoredModel) -> RenderableType:
    """One model's scores: accuracy and its standard error."""
    table = Grid(scored.model, "task", "shots", "metric", "items", "accuracy")
    several = any(task.others for task in scored.tasks)
    for task in scored.tasks:
        stderr = "" if task.stderr is None else f" ± {100 * task.stderr:.2f}"
        table.add_row(
            Text(task.name),
            str(task.num_fewshot),
            Text(f"{task.metric}{' *' if several else ''}"),
            f"{task.num_items:,}",
            f"{100 * task.accuracy:.2f}{stderr}",
        )
        for metric, value in task.others.items():
            table.add_row("", "", Text(metric), "", f"{100 * value:.2f}")
    notes: list[RenderableType] = [
        Text(
            f"{task.name}: {task.num_truncated:,} prompts did not fit the context and lost their beginning",
            style="yellow",
        )
        for task in scored.tasks
        if task.num_truncated
    ]
    if several:
        notes.append(Text("* decides; the others are shown", style="dim"))
    if (text := scored.text) is not None:
        size = f"{text.num_sequences:,} sequences, {text.num_tokens:,} tokens"
        low, high = text.ci95
        notes.append(Text(f"perplexity {text.perplexity:.3f} [{low:.3f}, {high:.3f}] of held-out text ({size})"))
    if scored.match is not None:
        notes += [Text(line) for line in match_lines(scored.match)]
    return Group(table, *notes)


def _score_cells(task: TaskComparison, quantized: bool) -> list[str | Text]:
    return [
        Text(task.task),
        percent(task.start),
        percent(task.twin),
        percent(task.arm),
        *([percent(task.arm_off)] if quantized else []),
        f"{task.drop_pp:+.2f}",
        interval(task.ci95_pp),
        Text(task.verdict, style=VERDICT_STYLES[task.verdict]),
    ]


def _other_cells(metric: str, values: Mapping[str, float], quantized: bool) -> list[str | Text]:
    """A metric that decides nothing."""
    shown = [percent(values.get(model)) for model in ("start", "twin", "arm")]
    drop = f"{100 * (values['twin'] - values['arm']):+.2f}" if {"twin", "arm"} <= values.keys() else "-"
    cells = [f"  {metric}", *shown, *([""] if quantized else []), drop, "", ""]
    return [Text(cell, style="dim") for cell in cells]


def _perplexity_cells(text: PerplexityComparison, off: float | None, quantized: bool) -> list[str | Text]:
    low, high = text.ci95_percent
    return [
        Text("perplexity"),
        *(_perplexity(value) for value in (text.start, text.twin, text.arm, *([off] if quantized else []))),
        f"{text.rise_percent:+.2f}%",
        f"{low:+.2f} .. {high:+.2f}%",
        Text("-") if text.verdict is None else Text(text.verdict, style=VERDICT_STYLES[text.verdict]),
    ]


def _text_evidence_cells(text: PerplexityComparison) -> list[str | Text]:
    settle, budget = text.sequences_to_settle, text.budget_percent
    return [
        Text("perplexity"),
        f"{text.num_sequences:,}",
        *("", "", "", ""),
        f"{text.detectable_rise_percent:.2f}%",
        "-" if budget is None else f"{budget:g}%",
        "-" if settle is None else f"~{settle:,}",
    ]


def _perplexity(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 1000 else f"{value:.3g}"


def _evidence_cells(task: TaskComparison) -> list[str | Text]:
    relative, settle = task.drop_relative_percent, task.items_to_settle
    return [
        Text(task.task),
        f"{task.num_items:,}",
        "-" if relative is None else f"{relative:+.2f}%",
        f"{task.mcnemar_p:.2g}",
        f"{task.flips_to_wrong}↓ {task.flips_to_right}↑",
        f"{task.mean_abs_delta_loglikelihood:.3f}",
        f"{task.detectable_drop_pp:.2f}",
        f"{task.budget_pp:g}",
        "-" if settle is None else f"~{settle:,}",
    ]


def _verdicts(pair: Pair, alarms: int) -> list[RenderableType]:
    comparison = pair.comparison
    more = f"conditional on {comparison.conditional_on}"
    lines: list[RenderableType] = [verdict_line(comparison.verdict, more, alarms)]
    if comparison.training is not None and pair.twin != START:
        lines.append(training_line(pair.arm, comparison.training))
    return lines


def _footer(pair: Pair) -> list[RenderableType]:
    comparison = pair.comparison
    lines: list[RenderableType] = []
    scored = ", ".join(f"{task.task} {task.num_fewshot}-shot {task.metric}" for task in comparison.tasks)
    lines.append(Text(f"scored: {scored}"))
    if comparison.perplexity is not None:
        read = comparison.perplexity
        size = f"{read.num_sequences:,} sequences, {read.num_tokens:,} tokens"
        lines.append(Text(f"perplexity: of held-out text, {size}"))
    elif pair.perplexity:
        names = {"start": "start", "twin": pair.twin, "arm": pair.arm, "arm_off": f"{pair.arm} quantizers off"}
        values = ", ".join(f"{names[key]} {value:.3f}" for key, value in pair.perplexity.items())
        lines.append(Text(f"held-out perplexity: {values}"))
    if pair.loss_ape_percent:
        names = {"all_steps": "all steps", "after_switch": "after the switch"}
        values = ", ".join(f"{value:.3f}% {names[key]}" for key, value in pair.loss_ape_percent.items())
        lines.append(Text(f"training loss APE: {values}"))
    spent = {"twin": "training", "arm": "calibration" if pair.method == "ptq" else "training"}
    costs = [
        (spent[who], f"{name} {cost.seconds:.0f} s and {readable_size(cost.peak_memory_bytes)} at most")
        for who, name in (("twin", pair.twin), ("arm", pair.arm))
        if (cost := pair.cost.get(who)) is not None
    ]
    for what in dict.fromkeys(of for of, _ in costs):
        lines.append(Text(f"{what}: {', '.join(cost for of, cost in costs if of == what)}"))
    if pair.sizes:
        sizes = ", ".join(f"{key.removesuffix('_bytes')} {readable_size(size)}" for key, size in pair.sizes.items())
        coverage = f"{pair.coverage}; " if pair.coverage else ""
        lines.append(Text(f"{coverage}weights on disk: {sizes}"))
    if pair.mismatches:
        lines.append(Text("compared anyway, although: " + "; ".join(pair.mismatches), style="yellow"))
    return lines


def training_line(arm: str, training: TrainingComparison) -> Text:
    """What was lost since the start model; a warning where no budget makes it count."""
    low, high = training.ci95_pp
    lost = f"{arm} lost {training.drop_pp:.1f} pp [{low:.1f}, {high:.1f}] against the start model over all tasks"
    counts = "" if training.asked else "; only said, not failed: budget.training makes it count"
    limit = f"budget {training.budget_pp:g}" if training.asked else f"above {training.budget_pp:g} is worth a look"
    style = VERDICT_STYLES[training.verdict]
    return Text.assemble("training: ", (training.verdict, style), f" -- {lost} ({limit}{counts})")


def verdict_line(verdict: Verdict, more: str, alarms: int = 0) -> Text:
    style = VERDICT_STYLES["inconclusive" if alarms and verdict == "within" else verdict]
    line = Text.assemble("verdict: ", (verdict, f"bold {style}"))
    if alarms:
        line.append(" ").append(f" {alarms} alarm{'s' if alarms > 1 else ''} ", style="bold reverse yellow")
    return line.append(f" -- {more}")


def percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.2f}"
