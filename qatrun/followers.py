"""The first process leads: it runs the command as if it were alone, reads and writes files, decides and prints, and what
takes all of them it calls `together`. The others follow, and do nothing else. So only what is called together ever runs on
more than one process, and a verb that calls nothing together is right in any world.

    together(act, own, others)   from the leader: act(own) here and act(others) on all others
    follow()                     what the others do meanwhile
    end(outcome)                 the leader lets them go
"""

from __future__ import annotations

import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from qatrun.errors import LostProcessError
from qatrun.ranks import entered, started, world

R = TypeVar("R")
T = TypeVar("T")

GRACE = 3.0  # seconds within which all that live have noticed that one does not
POLL = 0.1  # seconds; between two looks for a command, signals are heard
_BROKEN = ("gloo", "NCCL", "DistBackendError", "DistNetworkError", "DistStoreError", "Connection reset", "Broken pipe")
_num_commands = 0


def together(act: Callable[[T], R], own: T, others: T) -> R:
    """What `act(own)` returns or raises, called on this process, the leader, while `act(others)` runs on each of the others.

    Args:
        act: goes there by pickle, as do `others` and what it is a partial of.
    """
    if started().size == 1 or world().size > 1:  # already together: all are here
        return act(own)
    global _num_commands
    _store().set(f"command/{_num_commands}", pickle.dumps(partial(act, others)))
    number, _num_commands = _num_commands, _num_commands + 1
    try:
        with entered(started()):
            return act(own)
    except BaseException:
        _store().set(f"failed/{number}", b"")
        raise


def follow() -> Any:
    """Do what the leader calls this process to, until it ends; returns what it ended with."""
    global _num_commands
    while True:
        number, _num_commands = _num_commands, _num_commands + 1
        _wait_for(f"command/{number}")
        command = pickle.loads(_store().get(f"command/{number}"))
        if isinstance(command, _End):
            _store().set(f"left/{number}/{started().rank}", b"")
            return command.outcome
        try:
            with entered(started()):
                command()
        except Exception as error:
            if _is_broken(error):
                _store().set(f"alive/{started().rank}", b"")
            # The leader's own, which it says, where it fails too; else this process's, which is the end of the run.
            if not _comes(f"failed/{number}", 3 * GRACE):
                raise


def end(outcome: Any) -> None:
    """From the leader: nothing more is done together; `follow` returns the outcome on the others."""
    global _num_commands
    if started().size == 1 or not started().leads:
        return
    _store().set(f"command/{_num_commands}", pickle.dumps(_End(outcome)))
    number, _num_commands = _num_commands, _num_commands + 1
    # This process may hold the store that they read.
    _all_come([f"left/{number}/{rank}" for rank in range(1, started().size)], GRACE)


@contextmanager
def losses_named() -> Iterator[None]:
    """Say which process is missing where an exchange with it broke off.

    Raises:
        LostProcessError: an exchange broke off.
    """
    try:
        yield
    except RuntimeError as error:
        if started().size == 1 or not _is_broken(error):
            raise
        raise LostProcessError(_loss(str(error))) from error


@dataclass(frozen=True)
class _End:
    """The last command."""

    outcome: Any


def _is_broken(error: Exception) -> bool:
    """Whether it is of an exchange that another process did not come to."""
    return isinstance(error, RuntimeError) and any(sign in f"{type(error)} {error}" for sign in _BROKEN)


def _store() -> Any:
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    return PrefixStore("qatrun", _get_default_store())


def _wait_for(key: str) -> None:
    """However long it takes; signals are heard."""
    while not _store().check([key]):
        time.sleep(POLL)


def _comes(key: str, seconds: float) -> bool:
    """Whether it is there by then."""
    return _all_come([key], seconds)


def _all_come(keys: list[str], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (there := _store().check(keys)) and time.monotonic() < until:
        time.sleep(POLL)
    return bool(there)


def _loss(said: str) -> str:
    """A sentence on who is missing: all that live come here."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what a launcher sends to those that are left
    others = [rank for rank in range(started().size) if rank != started().rank]
    try:
        _store().set(f"alive/{started().rank}", b"")
        _all_come([f"alive/{rank}" for rank in others], GRACE)
        missing = [rank for rank in others if not _store().check([f"alive/{rank}"])]
    except RuntimeError:
        missing = []
    who = f"process {', '.join(map(str, missing))} of {started().size}" if missing else "another process of the run"
    how = "does not answer" if "imed out" in said or "imeout" in said else "has ended"
    return f"{who} {how} (counted from 0): {' '.join(said.split())[:200]}"
