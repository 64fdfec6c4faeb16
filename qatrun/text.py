"""How messages are worded: the nearest valid choice, values as a user wrote them, sizes as a person reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any


def suggestion(got: str, choices: Collection[str], otherwise: str | None = None, cutoff: float = 0.6) -> str:
    """` (did you mean 'hif8'?)`, or where nothing is near `otherwise` in brackets, by default ` (one of a, b)`; empty where
    there is nothing to say.

    Args:
        cutoff: how near is near, as `difflib.get_close_matches` has it.
    """
    if close := get_close_matches(got, choices, n=1, cutoff=cutoff):
        return f" (did you mean '{close[0]}'?)"
    if otherwise is None and choices:
        otherwise = f"one of {', '.join(choices)}"
    return f" ({otherwise})" if otherwise else ""


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


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Key path of a tree of mappings -> value; a list is one value."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        key: value for part, child in tree.items() for key, value in flat(child, f"{prefix}.{part}".strip(".")).items()
    }


def listed(parts: Iterable[str]) -> str:
    """`a, b and c`."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def interval(edges: Sequence[float], decimals: int = 2) -> str:
    """`-0.21 .. +0.94`."""
    low, high = edges
    return f"{low:+.{decimals}f} .. {high:+.{decimals}f}"


def readable_size(num_bytes: float) -> str:
    """Three digits or so in the largest binary unit that keeps them above 1: `76.2 KiB`, `2.10 GiB`."""
    for unit, decimals in (("B", 0), ("KiB", 1), ("MiB", 1), ("GiB", 2)):
        if num_bytes < 1024:
            return f"{num_bytes:.{decimals}f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"
