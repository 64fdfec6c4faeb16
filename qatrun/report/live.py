"""The live view of a study: one progress bar with an ETA, and under it what the step just did.

Where the output is no terminal (a log file, CI) the same is printed as plain lines, about ten a segment.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINES_PER_SEGMENT = 10


class TerminalDisplay:
    """Shows training and scoring on a console; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]{task.description:<22}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._what = ""
        self._steps_per_line = 1
        self._scored: dict[str, tuple[int, int]] = {}
        self._began = time.perf_counter()

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
        detail = (
            f"{row['phase']:<4} loss {row['loss']:.4f}  lr {row['learning_rate']:.1e}  "
            f"{row['tokens_per_second']:,.0f} tok/s  saturated {row['num_saturated']}"
        )
        self._advance(row["step"], detail)
        if not self.live and row["step"] % self._steps_per_line == 0:
            self.console.print(f"{self._what} step {row['step']}: {detail}", highlight=False)

    def begin_scoring(self, what: str) -> None:
        self._begin(f"scoring {what}", None, 0)
        self._scored = {}

    def on_scored(self, task: str, done: int, total: int) -> None:
        self._scored[task] = (done, total)
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, detail=task)

    def on_warning(self, text: str) -> None:
        self.note(f"[yellow]warning:[/yellow] {text}")

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def _begin(self, what: str, total: int | None, completed: int) -> None:
        self._what = what
        if not self.live:
            self.console.print(what, highlight=False)
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=total, completed=completed, detail="")

    def _advance(self, completed: int, detail: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=completed, detail=detail)
