"""Patterns of module names: a name, a glob, or `re:` and a regular expression that must match in full."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from fnmatch import fnmatchcase

import regex

PREFIX = "re:"
# Nested repeats need time exponential in the length of a name; an honest expression needs milliseconds for a whole model.
MATCH_SECONDS = 2.0
# Counts in braces that are nested unroll into their product when the expression is compiled.
MAX_REPEATS = 10_000
_COUNTS = regex.compile(r"\{(?:\d*,)?(\d{1,9})")


def check_pattern(pattern: str) -> str:
    """The pattern itself.

    Raises:
        ValueError: a regular expression that does not compile.
    """
    if pattern.startswith(PREFIX):
        if math.prod(int(count) for count in _COUNTS.findall(pattern) if int(count)) > MAX_REPEATS:
            raise ValueError(f"the counts of '{pattern:.60}' multiply to more than {MAX_REPEATS:,}")
        try:
            regex.compile(pattern.removeprefix(PREFIX))
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"invalid regular expression '{pattern}': {error}") from None
    return pattern


def matching_names(pattern: str, names: Iterable[str]) -> set[str]:
    """Those of the names that a checked pattern matches.

    Raises:
        ValueError: matching takes longer than `MATCH_SECONDS`.
    """
    if not pattern.startswith(PREFIX):
        return {name for name in names if fnmatchcase(name, pattern)}
    expression = regex.compile(pattern.removeprefix(PREFIX))
    deadline = time.monotonic() + MATCH_SECONDS
    try:
        return {name for name in names if expression.fullmatch(name, timeout=max(deadline - time.monotonic(), 0.0))}
    except TimeoutError:
        message = f"pattern '{pattern}' takes more than {MATCH_SECONDS:g} s to match: repeats inside repeats?"
        raise ValueError(message) from None
