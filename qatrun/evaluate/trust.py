"""Whether code that comes with a task file may run in this process.

A task file may name Python functions, metrics that are scripts, and templates that reach into Python. None of it runs
unless the user says so, anew for every command: the permission is kept in no recipe and in no study, so that neither can
bring it along.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

OPTION = "--trust-task-code"

_TRUSTED = ContextVar("trust_task_code", default=False)


@contextmanager
def trusting_task_code(trust: bool = True) -> Iterator[None]:
    """Let code of task files run, or not, within the block."""
    token = _TRUSTED.set(trust)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def task_code_is_trusted() -> bool:
    return _TRUSTED.get()
