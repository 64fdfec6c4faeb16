"""Sizes in bytes as a person reads them."""

from __future__ import annotations


def readable_size(num_bytes: float) -> str:
    """Three digits or so in the largest binary unit that keeps them above 1: `76.2 KiB`, `2.10 GiB`."""
    for unit, decimals in (("B", 0), ("KiB", 1), ("MiB", 1), ("GiB", 2)):
        if num_bytes < 1024:
            return f"{num_bytes:.{decimals}f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"
