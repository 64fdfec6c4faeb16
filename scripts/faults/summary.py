"""What the cells say together: a matrix for each model, every wrong answer with its numbers, alarms, faults.csv."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from faults.cells import Cell
from faults.healthy import at_most
from faults.labels import ANY, INPUT, Label, Wrong, healthy_costs, label, mistakes
from faults.models import SUBJECTS
from faults.studies import FAULTS, STEPS
from qatrun.records.diagnosis import Cause

NOTHING = "nothing"
MISTAKES = ("missed", "hid", "accused")  # the later, the heavier
LOOKED_AT = {model: (2, 3) if model == "gpt2" else (0, 1) for model in SUBJECTS}  # seeds, while the rule was mended


class Judged(NamedTuple):
    """A cell, its label, and what was wrong: (how, cause)."""

    cell: Cell
    label: Label
    wrong: list[tuple[Wrong, str]]


def judged(cells: Sequence[Cell]) -> list[Judged]:
    """Every cell that has a healthy one to stand beside."""
    healthy = healthy_costs(cells)
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
            f"  by the rule {', '.join(its.truth) or NOTHING}: forgetting {its.forgetting.token:+.3f} a token "
            f"{its.forgetting.answer:+.3f} an answer, quantization beyond {its.quantization.token:+.3f} "
            f"{its.quantization.answer:+.3f}\n"
            f"  said: {cell.sentence}\n" + "\n".join(_looks(cell))
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


NAMES = {  # as documents have them
    "stories260K": "stories, Llama 0.26M",
    "gut3m": "books, Llama 3.4M",
    "demo": "demo, Llama 2.7M",
    "code": "Python, GPT-NeoX 0.8M",
    "gpt2": "stories, GPT-2 1.0M",
}
TALLY = (
    "model",
    "harmful",
    "missed",
    "hid",
    "misnamed",
    "wrong, at most",
    "healthy",
    "accused",
    "at most",
    "not shown",
)


def tally(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """For each model, and for all, on the seeds that judge; then for all on those that the rule was mended on: harmful and
    healthy cells, how many of them were answered wrongly (and the upper end of the share's interval), and healthy ones that
    were not ruled out. Right is also what is not shown, where it is as small as the answer says.

    Args:
        rows: of faults.csv.
    Returns:
        rows of the columns TALLY.
    """
    looked_at = [row for row in rows if int(row["seed"]) in LOOKED_AT.get(row["model"], ())]
    judging = [row for row in rows if row not in looked_at]
    parts = {name: [row for row in judging if row["model"] == model] for model, name in NAMES.items()}
    parts |= {"all, judging": judging, "all, looked at": looked_at}
    return [(name, *_counts(part)) for name, part in parts.items() if part]


def _counts(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    harmful = [_mistake(row) for row in rows if row["label"]]
    healthy = [row for row in rows if not row["label"]]
    accused = sum(bool(row["wrong"]) for row in healthy)
    yield from (str(len(harmful)), *(str(harmful.count(how)) for how in MISTAKES))
    yield at_most(len(harmful) - harmful.count(""), len(harmful))
    yield from (str(len(healthy)), str(accused), at_most(accused, len(healthy)))
    yield str(sum(row["found"] == "not shown" for row in healthy))


def _mistake(row: Mapping[str, str]) -> str:
    """One of MISTAKES or ""; where another cause was named for a harmful one, that is the mistake, and not that it was ruled
    out, too."""
    made = [wrong.partition(":")[0] for wrong in row["wrong"].split()]
    return max(made, key=MISTAKES.index, default="")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The tally as documents have it."""
    lines = [TALLY, ("---",) * len(TALLY), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def right_and_false(cell: Cell, its: Label) -> tuple[dict[str, int], dict[str, int]]:
    """Its alarms, kind -> step: those that name harm which the rule sees, and those that name harm which it does not."""
    harmful = {cause if cause in (INPUT, "forgetting") else ANY for cause in its.truth}
    right: dict[str, int] = {}
    false: dict[str, int] = {}
    for kind, step in cell.alarms.items():
        of = kind if kind in (INPUT, "forgetting") else ANY
        (right if of in harmful or INPUT in harmful else false)[kind] = step
    return right, false


def alarms(cells: Sequence[Judged]) -> Table:
    """For each model: harmful arms with an alarm that names the harm, how long after the fault could act, and arms with one
    that names harm where there is none."""
    table = Table("model", "harmful", "alarmed", "delay, steps", "all arms", "alarmed falsely", "which")
    for model in dict.fromkeys(each.cell.model for each in cells):
        arms = [each for each in cells if each.cell.model == model and not each.cell.refused]
        raised = [(each, *right_and_false(each.cell, each.label)) for each in arms]
        delays = [min(right.values()) - FAULTS[each.cell.fault].acts_at for each, right, _ in raised if right]
        spread = f"{median(delays):g} ({min(delays)} to {max(delays)} of {STEPS})" if delays else "-"
        false = [f"{each.cell.study}/{each.cell.arm} {', '.join(wrong)}" for each, _, wrong in raised if wrong]
        harmful = sum(bool(each.label.truth) for each in arms)
        row = (model, str(harmful), str(len(delays)), spread, str(len(arms)), str(len(false)), "; ".join(false))
        table.add_row(*row)
    return table


COLUMNS = (
    *("model", "seed", "study", "format", "fault", "probe"),
    *("forgetting_nats_token", "forgetting_nats_answer", "quantization_nats_token", "quantization_nats_answer"),
    *("label", "found", "wrong", "alarms", "input", "forgetting", "saturation", "resolution", "divergence"),
)


def write_csv(file: Path, cells: Sequence[Judged]) -> None:
    """A row for each cell."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(COLUMNS)
        writer.writerows(_row(*each) for each in cells)


def read_csv(file: Path) -> list[dict[str, str]]:
    """Its rows."""
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def _row(cell: Cell, its: Label, wrong: Sequence[tuple[Wrong, str]]) -> Iterator[str]:
    yield from (cell.model, str(cell.seed), cell.study, cell.format, cell.fault, "yes" if cell.probe else "no")
    yield from (f"{value:.4f}" for value in (*its.forgetting, *its.quantization))
    yield from (" ".join(its.truth), said(cell), " ".join(f"{how}:{cause}" for how, cause in wrong))
    yield " ".join(f"{kind}@{step}" for kind, step in cell.alarms.items())
    for name in COLUMNS[-5:]:
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
    console.print(alarms(found))
    write_csv(file, found)
    console.print(markdown(tally(read_csv(file))), markup=False, highlight=False, soft_wrap=True)
    return sum(bool(each.wrong) for each in found)
