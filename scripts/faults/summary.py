"""What the cells say one by one: a matrix for each model, every wrong answer with its numbers, false alarms, faults.csv."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from faults.cells import Cell
from faults.labels import ANY, INPUT, Costs, Label, Wrong, healthy_cells, label, mistakes
from faults.studies import FAULTS
from faults.tally import write_csv
from qatrun.records.diagnosis import Cause

NOTHING = "nothing"


class Judged(NamedTuple):
    """A cell, its label, and what was wrong: (how, cause)."""

    cell: Cell
    label: Label
    wrong: list[tuple[Wrong, str]]


def judged(cells: Sequence[Cell]) -> list[Judged]:
    """Every cell that has a healthy one to stand beside."""
    healthy = healthy_cells(cells)
    found = []
    for cell in cells:
        usual = healthy.get((cell.model, cell.seed, cell.text, cell.format))
        if usual is not None:
            its = label(cell, FAULTS[cell.fault].causes, usual)
            found.append(Judged(cell, its, list(mistakes(cell, its))))
    return found


def said(cell: Cell) -> str:
    """What the diagnosis found; else whether it could rule everything out."""
    if cell.refused:
        return "refused"
    found = [cause for cause, each in cell.answers.items() if each.answer == "found"]
    if INPUT in cell.alarms or cell.warned:
        found = [INPUT, *(cause for cause in found if cause != INPUT)]
    if found:
        return ", ".join(found)
    return "not shown" if any(each.answer == "not shown" for each in cell.answers.values()) else "ruled out"


def matrix(cells: Sequence[Judged], title: str) -> Table:
    """What the rule says, down, by what was said, across."""
    counts = Counter((", ".join(each.label.truth) or NOTHING, said(each.cell)) for each in cells)
    rows = sorted({truth for truth, _ in counts}, key=lambda name: (name != NOTHING, name))
    columns = sorted(
        {answer for _, answer in counts}, key=lambda name: (name != "ruled out", name != "not shown", name)
    )
    table = Table("harmful by the rule \\ said", *columns, title=title)
    for truth in rows:
        table.add_row(truth, *(str(counts[truth, answer] or "") for answer in columns))
    return table


def wrong_answers(cells: Sequence[Judged]) -> Iterator[str]:
    """A paragraph for each cell of which something wrong was said: what, and the looks that it stands on."""
    for cell, its, wrong in cells:
        if not wrong:
            continue
        yield (
            f"{cell.model} seed {cell.seed} {cell.study}/{cell.arm} ({'with' if cell.probe else 'without'} probe): "
            f"{'; '.join(f'{how} {cause}' for how, cause in wrong)}\n"
            f"  by the rule {', '.join(its.truth) or NOTHING}{' (open: ' + ', '.join(its.open) + ')' if its.open else ''}: "
            f"forgetting {_shown(its.forgetting)}, quantization beyond {_shown(its.quantization)}\n"
            f"  said: {cell.sentence}\n" + "\n".join(_looks(cell))
        )


def _shown(costs: Costs) -> str:
    return " and ".join(
        f"{cost.mean:+.3f} [{cost.low:+.3f}, {cost.high:+.3f}] {unit}"
        for cost, unit in zip(costs, ("a token", "an answer"), strict=True)
    )


def _looks(cell: Cell) -> Iterator[str]:
    for name, cause in cell.answers.items():
        yield f"  {name}: {_answer(cause)}"
        for look in cause.looks:
            numbers = " and ".join(
                f"{effect} {value:+.3f} [{low:+.3f}, {high:+.3f}]"
                for effect, value, (low, high) in zip(look.effects, look.values, look.intervals, strict=True)
            )
            decides = "decides, " if look.decides else ""
            yield f"    {look.what}: {numbers} {look.unit}, line {look.threshold:g} ({decides}{look.answer})"


def _answer(cause: Cause) -> str:
    return cause.answer if cause.could_hide is None else f"{cause.answer} (up to {cause.could_hide:.3f} {cause.unit})"


def right_and_false(cell: Cell, its: Label) -> tuple[dict[str, int], dict[str, int]]:
    """Its alarms, kind -> step: those that name harm which the rule sees, and those that name harm which it does not."""
    harmful, open_ = ({_harm(cause) for cause in causes} for causes in (its.truth, its.open))
    right = {kind: step for kind, step in cell.alarms.items() if _harm(kind) in harmful or INPUT in harmful}
    false = {kind: step for kind, step in cell.alarms.items() if kind not in right and _harm(kind) not in open_}
    return right, false


def _harm(cause: str) -> str:
    return cause if cause in (INPUT, "forgetting") else ANY


def false_alarms(cells: Sequence[Judged]) -> Iterator[str]:
    """A line for each arm that raised one."""
    for cell, its, _ in cells:
        if wrong := right_and_false(cell, its)[1]:
            raised = ", ".join(f"{kind}@{step}" for kind, step in wrong.items())
            yield f"{cell.model} seed {cell.seed} {cell.study}/{cell.arm}: false alarm {raised}"


COSTS = ("forgetting_nats_token", "forgetting_nats_answer", "quantization_nats_token", "quantization_nats_answer")
CAUSES = ("input", "forgetting", "saturation", "resolution", "divergence")
COLUMNS = (
    *("model", "seed", "study", "format", "fault", "probe"),
    *(f"{cost}{end}" for cost in COSTS for end in ("", "_low", "_high")),
    *("label", "open", "found", "wrong", "alarms", "alarm_delay", "false_alarms", *CAUSES),
)


def _row(cell: Cell, its: Label, wrong: Sequence[tuple[Wrong, str]]) -> Iterator[str]:
    right, false = right_and_false(cell, its)
    yield from (cell.model, str(cell.seed), cell.study, cell.format, cell.fault, "yes" if cell.probe else "no")
    yield from (f"{value:.4f}" for costs in (its.forgetting, its.quantization) for cost in costs for value in cost)
    yield from (" ".join(its.truth), " ".join(its.open), said(cell), " ".join(f"{how}:{cause}" for how, cause in wrong))
    yield " ".join(f"{kind}@{step}" for kind, step in cell.alarms.items())
    yield str(min(right.values()) - FAULTS[cell.fault].acts_at) if right else ""
    yield " ".join(f"{kind}@{step}" for kind, step in false.items())
    for name in CAUSES:
        yield _short(cell.answers[name]) if name in cell.answers else ""


def _short(cause: Cause) -> str:
    """The answer, with the first effect of the look that it stands on, its interval, and what could hide."""
    deciding = [look for look in cause.looks if look.answer == cause.answer] or cause.looks
    if not deciding:
        return cause.answer
    look = deciding[0]
    low, high = look.intervals[0]
    numbers = f"{look.values[0]:.3f} [{low:.3f}, {high:.3f}] {look.unit}"
    hidden = f", {cause.could_hide:.3f} could hide" if cause.could_hide is not None else ""
    return f"{cause.answer}: {numbers} of {look.what}{hidden}"


def summarize(cells: Sequence[Cell], file: Path, console: Console) -> int:
    """Print it all and write faults.csv; returns how many cells were answered wrongly."""
    found = judged(cells)
    for model in dict.fromkeys(cell.model for cell in cells):
        of_model = [each for each in found if each.cell.model == model]
        console.print(matrix(of_model, f"{model}: {len(of_model)} cells"))
    for text in wrong_answers(found):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for line in false_alarms(found):
        console.print(line, markup=False, highlight=False)
    write_csv(file, COLUMNS, [list(_row(*each)) for each in found])
    return sum(bool(each.wrong) for each in found)
