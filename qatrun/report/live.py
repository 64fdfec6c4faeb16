"""The live view of a study: which stage it is in, a progress bar with an ETA, and under it what the step just did.

Where the output is no terminal (a log file, CI) the same is printed as plain lines: ten a segment, and one a minute.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

from qatrun.report.grid import Flow
from qatrun.report.stages import Pace, Stage, clock_time

LINES_PER_SEGMENT = 10
SECONDS_PER_LINE = 60.0  # at most: a log that stands still looks like a run that hangs
BAR_FROM = 50  # columns of a terminal; a narrower one shows the numbers without the bar


class _Count(ProgressColumn):
    """`12/300`; before anything is done, what it waits for."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("loading", style="dim")
        return Text(f"{task.completed:.0f}/{task.total:.0f}", style="progress.download")


class _Lines(Progress):
    """The stage above the bar and the detail below it: side by side they do not fit 80 columns, and nothing is cut."""

    pace = Pace()

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            left = self.pace.seconds_left
            more = f"   {clock_time(left)} left of the study" if left is not None else ""
            yield Text.assemble((task.description, "bold"), (more, "dim"), overflow="fold")
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Flow([Text(part, style="dim") for part in task.fields["detail"].split("  ")])


class TerminalDisplay:
    """Shows training and scoring on a console; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self._progress = _Lines(*_columns(console.width), console=console, transient=True, expand=True)
        self._task: TaskID | None = None
        self._what, self._first, self._last = "", 0, 0
        self._twin: Mapping[int, float] = {}
        self._steps_per_line = 1
        self._last_line = time.monotonic()
        self._pace = Pace()

    def __enter__(self) -> TerminalDisplay:
        if self.live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._progress.stop()

    def begin_study(self, stages: Sequence[Stage]) -> None:
        self._pace = self._progress.pace = Pace(stages)

    def begin_training(
        self, segment: str, first_step: int, last_step: int, twin_losses: Mapping[int, float] | None = None
    ) -> None:
        self._first, self._last, self._twin = first_step, last_step, twin_losses or {}
        self._pace.begin("training", segment)
        self._begin(f"training {segment}", last_step, first_step)
        self._steps_per_line = max(1, (last_step - first_step) // LINES_PER_SEGMENT)

    def on_step(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        self._pace.advance(step - self._first)
        twin = f" (twin {self._twin[step]:.4f})" if step in self._twin else ""
        teacher = f"  kl {row['distill_kl']:.4f}" if "distill_kl" in row else ""
        detail = (
            f"{row['phase']:<4} loss {row['loss']:.4f}{twin}{teacher}  lr {row['learning_rate']:.1e}  "
            f"{row['tokens_per_second']:,.0f} tok/s  saturated {row['num_saturated']}"
        )
        if self._task is not None:
            self._progress.update(self._task, completed=step, detail=detail)
        is_due = step % self._steps_per_line == 0 or time.monotonic() - self._last_line >= SECONDS_PER_LINE
        if not self.live and is_due:
            self._log(f"{self._what} step {step} of {self._last}: {detail}")

    def begin_reading(self, what: str) -> None:
        self._pace.begin("reading", what)
        self._begin(f"reading {what}", None, 0)

    def begin_scoring(self, what: str) -> None:
        self._pace.begin("scoring", what)
        self._begin(f"scoring {what}", None, 0)

    def on_scored(self, task: str, done: int, total: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, detail=task)
        elif time.monotonic() - self._last_line >= SECONDS_PER_LINE:
            self._log(f"{self._what}: {task} {done:,} of {total:,}")

    def on_warning(self, text: str) -> None:
        self.console.print(Text.assemble(("warning: ", "yellow"), text))

    def on_alarm(self, text: str) -> None:
        self.console.print(Text.assemble(("alarm: ", "bold red"), text))

    def note(self, text: str) -> None:
        self.console.print(Text(text))

    def _log(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.note(f"{datetime.now():%H:%M:%S} {text}")

    def _begin(self, what: str, total: int | None, completed: int) -> None:
        self._what = what
        shown = f"{self._pace.place}: {what}" if self._pace.place else what
        if not self.live:
            left = self._pace.seconds_left
            self._log(shown + (f" (about {clock_time(left)} left of the study)" if left is not None else ""))
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(shown, total=total, completed=completed, detail="")


def _columns(width: int) -> list[ProgressColumn]:
    if width < BAR_FROM:
        return [_Count(), Remaining()]
    return [BarColumn(bar_width=None), _Count(), TimeElapsedColumn(), TextColumn("ETA"), Remaining()]
