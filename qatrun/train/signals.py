"""SIGINT and SIGTERM ask a run to save and end. A second SIGINT, of someone who will not wait, ends it at once; a second
SIGTERM does not: a scheduler sends it to every process and to what started them, which passes it on, and the save would be
lost. Nor does one of several processes end by itself."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qatrun.ranks import world


class StopRequest:
    """Whether a signal has asked the run to stop."""

    name: str | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop reads between two steps."""
    request, alone = StopRequest(), world().size == 1

    def handle(number: int, _frame: FrameType | None) -> None:
        if request.name is not None and number == signal.SIGINT and alone:
            raise KeyboardInterrupt
        request.name = request.name or signal.Signals(number).name

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
