"""Text that is on every machine: the source of Python's standard library, in pieces, and the prose of its language reference
(`pydoc_data.topics`). It follows the Python at hand, so two versions of it make models that differ a little."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

PIECE = 2_000  # characters
NO_CODE = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "encodings"}


def source_code() -> tuple[Iterator[str], Iterator[str]]:
    """(to learn, held out) pieces of the standard library; of nine files one is held out."""
    root = Path(os.__file__).parent
    files = [file for file in sorted(root.rglob("*.py")) if not NO_CODE & set(file.relative_to(root).parts)]
    Random(0).shuffle(files)
    return _pieces(files[len(files) // 9 :]), _pieces(files[: len(files) // 9])


def prose() -> tuple[Iterator[str], Iterator[str]]:
    """(to learn, held out) pieces of the language reference."""
    from pydoc_data.topics import topics

    texts = [piece for name in sorted(topics) for piece in _cut(topics[name])]
    Random(0).shuffle(texts)
    return iter(texts[len(texts) // 4 :]), iter(texts[: len(texts) // 4])


def _pieces(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        yield from _cut(file.read_text(encoding="utf-8", errors="replace"))


def _cut(text: str) -> Iterator[str]:
    """At ends of lines."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            yield piece
            piece = ""
    if piece.strip():
        yield piece
