"""The live view of a study: one progress bar with an ETA, and under it what the step just did.

Where the output is no terminal (a log file, CI) the same is printed as plain lines, about ten a segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from qatrun.report.grid import Flow

LINES_PER_SEGMENT = 10
BAR_FROM = 72  # columns of a terminal; a narrower one shows the numbers without the bar


class _TwoLines(Progress):
    """The detail below the bar: side by side they do not fit 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Flow([Text(part, style="dim") for part in task.fields["detail"].split("  ")])


class TerminalDisplay:
    """Shows training and scoring on a console; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self._progress = _TwoLines(*_columns(console.width), console=console, transient=True)
        self._task: TaskID | None = None
        self._what = ""
        self._steps_per_line = 1

    def __enter__(self) -> TerminalDisplay:
        if self.live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._progress.stop()

    def begin_training(self, segment: str, first_step: int, last_step: int) -> None:
        self._begin(f"training {segment}", last_step, first_step)
        self._steps_per_line = max(1, (last_step - first_step) // LINES_PER_SEGMENT)

    def on_step(self, row: Mapping[str, Any]) -> None:
        from_teacher = f"  kl {row['distill_kl']:.4f}" if "distill_kl" in row else ""
        detail = (
            f"{row['phase']:<4} loss {row['loss']:.4f}{from_teacher}  lr {row['learning_rate']:.1e}  "
            f"{row['tokens_per_second']:,.0f} tok/s  saturated {row['num_saturated']}"
        )
        if self._task is not None:
            self._progress.update(self._task, completed=row["step"], detail=detail)
        if not self.live and row["step"] % self._steps_per_line == 0:
            self.note(f"{self._what} step {row['step']}: {detail}")

    def begin_scoring(self, what: str) -> None:
        self._begin(f"scoring {what}", None, 0)

    def on_scored(self, task: str, done: int, total: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, detail=task)

    def on_warning(self, text: str) -> None:
        self.console.print(Text.assemble(("warning: ", "yellow"), text))

    def on_alarm(self, text: str) -> None:
        self.console.print(Text.assemble(("alarm: ", "bold red"), text))

    def note(self, text: str) -> None:
        self.console.print(Text(text))

    def _begin(self, what: str, total: int | None, completed: int) -> None:
        self._what = what
        if not self.live:
            self.note(what)
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=total, completed=completed, detail="")


def _columns(width: int) -> list[ProgressColumn]:
    wide = width >= BAR_FROM
    one_line = Column(no_wrap=True, overflow="ellipsis", max_width=30 if wide else max(8, width - 24))
    what = TextColumn("{task.description}", style="bold", markup=False, table_column=one_line)
    if not wide:
        return [what, MofNCompleteColumn(), TimeRemainingColumn()]
    elapsed = [TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()]
    return [what, BarColumn(bar_width=16), MofNCompleteColumn(), *elapsed]
