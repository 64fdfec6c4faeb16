"""Whoever shows how a study goes: the terminal, a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qatrun.report.stages import Stage
from qatrun.train.segment import Listener


class ScoringDisplay(Protocol):
    """Who is told how scoring goes."""

    def begin_reading(self, what: str) -> None:
        """Something is about to be read, or written to be read: it takes a while, and nobody counts."""

    def begin_scoring(self, what: str) -> None:
        """A model is about to be scored."""

    def on_scored(self, task: str, done: int, total: int) -> None:
        """Requests of a task answered so far."""

    def on_warning(self, text: str) -> None:
        """Something a person should know."""


class Display(ScoringDisplay, Listener, Protocol):
    """Who is told how a study goes."""

    def begin_study(self, stages: Sequence[Stage]) -> None:
        """What will be done, in order; stages that are done already are never begun."""

    def begin_training(
        self, segment: str, first_step: int, last_step: int, twin_losses: Mapping[int, float] | None = None
    ) -> None:
        """A segment starts, or goes on.

        Args:
            twin_losses: step -> training loss of the BF16 twin, where that was trained before.
        """

    def note(self, text: str) -> None:
        """One line on what was done."""


class _Silent:
    """Of the processes that do not lead."""

    def begin_reading(self, what: str) -> None: ...

    def begin_scoring(self, what: str) -> None: ...

    def begin_study(self, stages: Sequence[Stage]) -> None: ...

    def begin_training(
        self, segment: str, first_step: int, last_step: int, twin_losses: Mapping[int, float] | None = None
    ) -> None: ...

    def on_scored(self, task: str, done: int, total: int) -> None: ...

    def on_step(self, row: Mapping[str, Any]) -> None: ...

    def on_warning(self, text: str) -> None: ...

    def on_alarm(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


SILENT: Display = _Silent()
