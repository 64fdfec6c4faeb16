"""From the start model to what ships, arm by arm and ranked: what comes first on terminal, page and in notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qatrun.records.comparison import Pair
from qatrun.records.diagnosis import ArmDiagnosis
from qatrun.records.training import AlarmRow, distinct
from qatrun.records.values import VERDICTS, Verdict
from qatrun.report.markup import latex, markdown
from qatrun.text import interval, listed, readable_size

State = Literal["good", "warn", "bad"]


@dataclass(frozen=True)
class Total:
    """One arm. Accuracies are shares of the items of all tasks together, in [0, 1].

    Attributes:
        start, twin, arm: accuracy of the start model (None: not scored), of the BF16 twin, and of what ships.
        hidden: a phrase on each cause that the diagnosis could not rule out.
        alarms: raised while the arm or its twin was trained.
    """

    pair: Pair
    start: float | None
    twin: float
    arm: float
    diagnosed: bool
    found: tuple[str, ...]
    hidden: tuple[str, ...]
    alarms: int

    @property
    def verdict(self) -> Verdict:
        return self.pair.comparison.verdict

    @property
    def state(self) -> State:
        """What colour it deserves: never green while an alarm stands, or while harm was not ruled out."""
        if self.verdict == "exceeds" or self.found:
            return "bad"
        return "warn" if self.verdict == "inconclusive" or self.hidden or self.alarms else "good"

    @property
    def lost_pp(self) -> float | None:
        """Since the start model, percentage points."""
        return None if self.start is None else 100 * (self.start - self.arm)

    @property
    def training_pp(self) -> float | None:
        return None if self.start is None else 100 * (self.start - self.twin)

    @property
    def quantization_pp(self) -> float:
        return 100 * (self.twin - self.arm)

    @property
    def perplexity(self) -> float | None:
        """Of what ships, on held-out text."""
        text = self.pair.comparison.perplexity
        return text.arm if text else self.pair.perplexity.get("arm")

    @property
    def size_bytes(self) -> float | None:
        """Of the weights that ship."""
        return self.pair.sizes.get("quantized_bytes", self.pair.sizes.get("plain_bytes"))

    @property
    def answer(self) -> str:
        """The verdict, and what stands against it."""
        alarms = f", {self.alarms} alarm{'s' if self.alarms > 1 else ''}" if self.alarms else ""
        return f"{self.verdict}{alarms}"

    @property
    def next_step(self) -> str:
        """What to do now, in a sentence."""
        if self.found:
            return f"{listed(self.found)}: `qatrun fix` tries the remedy as another arm"
        if self.verdict == "exceeds":
            return "a drop exceeds its budget: finer scales, another format, or sensitive layers in BF16"
        if self.alarms:
            return "look at the alarms before this ships: they say what to change"
        training = self.pair.comparison.training
        if training is not None and training.verdict == "exceeds":
            return "training lost more than quantization may: lower train.learning_rate"
        if self.verdict == "inconclusive":
            return f"more evidence{_needed(self.pair)}: raise or leave out eval.limit"
        if self.hidden:
            return "harm was not ruled out: more items (eval.limit, diagnose.items) or more text would"
        return "ship it" if self.diagnosed else "`qatrun diagnose` says whether anything hides"


def totals(
    pairs: Sequence[Pair], diagnosed: Mapping[str, ArmDiagnosis], alarms: Mapping[str, Sequence[AlarmRow]]
) -> tuple[Total, ...]:
    """Of every quantized arm, the best first: by verdict, then by what harm was found, then by the accuracy that ships.

    Args:
        alarms: arm -> those it raised, its trunk's among them.
    """
    found = [_total(pair, diagnosed.get(pair.arm), alarms) for pair in pairs]
    return tuple(sorted(found, key=lambda total: (VERDICTS.index(total.verdict), len(total.found), -total.arm)))


def _total(pair: Pair, diagnosis: ArmDiagnosis | None, alarms: Mapping[str, Sequence[AlarmRow]]) -> Total:
    tasks = pair.comparison.tasks
    num_items = sum(task.num_items for task in tasks)

    def pooled(accuracies: Sequence[float | None]) -> float | None:
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        if len(known) < len(tasks) or not num_items:
            return None
        return sum(accuracy * task.num_items for accuracy, task in zip(known, tasks, strict=True)) / num_items

    causes = diagnosis.causes if diagnosis else {}
    return Total(
        pair,
        pooled([task.start for task in tasks]),
        pooled([task.twin for task in tasks]) or 0.0,
        pooled([task.arm for task in tasks]) or 0.0,
        diagnosis is not None,
        tuple(diagnosis.findings if diagnosis else ()),
        tuple(
            name if cause.could_hide is None else f"{name} (up to {cause.could_hide:.2g} {cause.unit} could hide)"
            for name, cause in causes.items()
            if cause.answer == "not shown"
        ),
        len(distinct([*alarms.get(pair.arm, ()), *alarms.get(pair.twin, ())])),
    )


def _needed(pair: Pair) -> str:
    items = [task.items_to_settle for task in pair.comparison.tasks if task.items_to_settle]
    return f" (about {max(items):,} items settle it)" if items else ""


COLUMNS = ("arm", "format", "accuracy", "lost pp", "95% interval", "quant. pp", "perplexity", "size", "verdict")
LEGEND = (
    "lost: percentage points of accuracy over all tasks since the start model, with its 95% interval; quant.: the part of "
    "it against the BF16 twin, which is quantization's"
)


def ranked_rows(ranked: Sequence[Total]) -> list[tuple[str, ...]]:
    """A row an arm under COLUMNS, the start model's first."""
    if not ranked:
        return []
    first, text = ranked[0], ranked[0].pair.comparison.perplexity
    start = ("start", "", _percent(first.start), "", "", "", _perplexity(text.start if text else None), "", "")
    return [start, *map(_row, ranked)]


def _row(total: Total) -> tuple[str, ...]:
    pair, training, size = total.pair, total.pair.comparison.training, total.size_bytes
    return (
        *(pair.arm, pair.format, _percent(total.arm)),
        "-" if total.lost_pp is None else f"{total.lost_pp:+.2f}",
        "-" if training is None else interval(training.ci95_pp),
        f"{total.quantization_pp:+.2f}",
        _perplexity(total.perplexity),
        "-" if size is None else readable_size(size),
        total.answer,
    )


TASK_COLUMNS = (
    *(
        "arm",
        "task",
        "metric",
        "items",
        "start",
        "twin",
        "quantized",
        "drop pp",
        "95% interval",
        "budget pp",
        "verdict",
    ),
)


def task_rows(ranked: Sequence[Total]) -> list[tuple[str, ...]]:
    """A row an arm and metric of a task under TASK_COLUMNS; the metric that decides has a star where there are others."""
    rows: list[tuple[str, ...]] = []
    for pair, task in ((total.pair, task) for total in ranked for task in total.pair.comparison.tasks):
        scores = (_percent(task.start), _percent(task.twin), _percent(task.arm))
        decides = (f"{task.drop_pp:+.2f}", interval(task.ci95_pp), f"{task.budget_pp:g}", task.verdict)
        star = " *" if task.others else ""
        rows.append((pair.arm, task.task, f"{task.metric}{star}", f"{task.num_items:,}", *scores, *decides))
        for metric, values in task.others.items():
            others = (_percent(values.get(model)) for model in ("start", "twin", "arm"))
            rows.append((pair.arm, task.task, metric, "", *others, "", "", "", ""))
    return rows


def marked_up(ranked: Sequence[Total], form: str) -> str:
    """Both tables, for a paper.

    Args:
        form: "latex" or "markdown".
    """
    write = {"latex": latex, "markdown": markdown}[form]
    return f"{write(COLUMNS, ranked_rows(ranked))}\n{write(TASK_COLUMNS, task_rows(ranked))}"


def tiles(total: Total) -> list[tuple[str, str, str]]:
    """What of an arm stands above all tables: (what, how much, more about it)."""
    pair, text = total.pair, total.pair.comparison.perplexity
    before, after = pair.sizes.get("plain_bytes"), pair.sizes.get("quantized_bytes")
    start = text.start if text else pair.perplexity.get("start")
    found = [
        (
            "accuracy",
            f"{_percent(total.start)} → {_percent(total.arm)} %",
            "start → shipped" if total.lost_pp is None else f"{0 - total.lost_pp:+.2f} pp, all tasks".replace("-", "−"),
        ),
        ("perplexity", f"{_perplexity(start)} → {_perplexity(total.perplexity)}", "held-out text"),
    ]
    if before and after:
        found.append(("size", f"{readable_size(before)} → {readable_size(after)}", f"{before / after:.1f}× smaller"))
    return [*found, ("budget", total.answer, f"against {pair.twin}"), ("next", total.next_step, "")]


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.2f}"


def _perplexity(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 1000 else f"{value:.3g}"
