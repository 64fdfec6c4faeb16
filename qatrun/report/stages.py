"""How far a study is: which of its stages, and how long the rest will take at the pace of what was done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["reading", "training", "scoring"]


@dataclass(frozen=True)
class Stage:
    """Attributes:
    what: as it is announced when it begins.
    amount: optimizer steps, or models to score; 1 where something is read.
    """

    kind: Kind
    what: str
    amount: float


class Pace:
    """Follows the stages of a study; those that a resume leaves out are passed over.

    Args:
        clock: seconds.
    """

    def __init__(self, stages: Sequence[Stage] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self.stages = stages
        self._clock = clock
        self._place = -1
        self._begun = clock()
        self._done = 0.0
        self._spent: dict[Kind, tuple[float, float]] = {}  # seconds, amount

    def begin(self, kind: Kind, what: str) -> None:
        """A stage begins, and the one before has ended."""
        if self._place >= 0:
            now = self.stages[self._place]
            self._count(self._done if now.kind == "training" else now.amount)
        later = range(self._place + 1, len(self.stages))
        found = (number for number in later if (self.stages[number].kind, self.stages[number].what) == (kind, what))
        self._place = next(found, self._place)
        self._begun, self._done = self._clock(), 0.0

    def advance(self, amount: float) -> None:
        """So many steps of the stage are done."""
        self._done = amount

    @property
    def place(self) -> str:
        """`3 of 9`; empty where nobody said what the stages are."""
        return f"{self._place + 1} of {len(self.stages)}" if self._place >= 0 else ""

    @property
    def seconds_left(self) -> float | None:
        """Of the whole study; None where nothing of some kind was done yet."""
        if self._place < 0:
            return None
        now, elapsed = self.stages[self._place], self._clock() - self._begun
        paces = {kind: seconds / amount for kind, (seconds, amount) in self._spent.items() if amount}
        if self._done and now.kind == "training":
            paces["training"] = elapsed / self._done
        later = self.stages[self._place + 1 :]
        if any(stage.kind not in paces for stage in (now, *later)):
            return None
        rest = now.amount - (self._done if now.kind == "training" else elapsed / paces[now.kind])
        return max(0.0, rest) * paces[now.kind] + sum(stage.amount * paces[stage.kind] for stage in later)

    def _count(self, amount: float) -> None:
        kind = self.stages[self._place].kind
        seconds, before = self._spent.get(kind, (0.0, 0.0))
        self._spent[kind] = seconds + self._clock() - self._begun, before + amount


def clock_time(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
