"""The world: the processes that train one model together. Torch-free, and below all that computes.

One process is a world of one, where nothing is exchanged and everything is its own; so who trains asks no world for its
size. It is the only one so far. What a larger one has to answer is said at each method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """As one of its processes sees it. All of them come to every exchange, in the same order."""

    rank: int = field(default=0, init=False)
    size: int = field(default=1, init=False)

    def first(self, act: Callable[[], T]) -> T:
        """What `act` returns, or raises, on the first process, where alone it is called; on all of them."""
        return act()

    def maximum(self, x: Tensor) -> Tensor:
        """The largest of all, value by value: exact, in whatever order they come."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum of all, value by value."""
        return x

    def agree(self, reason: str | None) -> str | None:
        """One reason on all processes: that of any which has one."""
        return reason

    def mine(self, parts: Sequence[T]) -> Sequence[T]:
        """Which of the parts, the same on all processes, this one takes."""
        return parts[self.rank :: self.size]


ALONE = World()
