"""What a path that a user wrote means. It is expanded once, where it comes in: by the schema, or by the command line."""

from __future__ import annotations

import os


def expand_path(written: str) -> str:
    """The path with `~` and `~user` replaced by home folders; hub ids and names such as `builtin:demo` stay as they are.

    Raises:
        ValueError: it is empty, or no path can be that; the message says so.
    """
    if not written:
        raise ValueError("must not be empty")
    if "\0" in written:
        raise ValueError("must not hold a NUL character")
    return os.path.expanduser(written)  # noqa: PTH111  # pathlib fails on a user that is not there
