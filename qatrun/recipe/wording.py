"""How messages about a recipe are worded: what was got, and the nearest valid choice."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any


def suggestion(got: str, choices: Collection[str]) -> str:
    """` (did you mean 'hif8'?)`, ` (one of a, b)` where nothing is near, or nothing where there is no choice."""
    close = get_close_matches(got, choices, n=1)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (one of {', '.join(choices)})" if choices else ""


def number(value: float) -> str:
    """A bound in full: 4294967295, not 4.29497e+09."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def shown(value: Any) -> str:
    """A value as a user wrote it in YAML."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str) else str(value)
