"""Text that is on every machine, in pieces: the source of Python's standard library, the prose of its language reference
(`pydoc_data.topics`), PyTorch's C++ headers and its docstrings. It follows the versions at hand, and models made with others
differ a little."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

import torch

PIECE = 2_000  # characters
NO_CODE = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "encodings"}
TORCH = Path(torch.__file__).parent


def source_code() -> tuple[Iterator[str], Iterator[str]]:
    """(to learn, held out) pieces of the standard library; of nine files one is held out."""
    root = Path(os.__file__).parent
    return _parted(file for file in root.rglob("*.py") if not NO_CODE & set(file.relative_to(root).parts))


def headers() -> tuple[Iterator[str], Iterator[str]]:
    """The same of PyTorch's C++ headers."""
    return _parted((TORCH / "include").rglob("*.h"))


def docstrings() -> tuple[Iterator[str], Iterator[str]]:
    """The same of the docstrings of its modules."""
    return _parted((file for file in TORCH.rglob("*.py") if "testing" not in file.parts), _said)


def prose() -> tuple[Iterator[str], Iterator[str]]:
    """(to learn, held out) pieces of the language reference."""
    from pydoc_data.topics import topics

    texts = [piece for name in sorted(topics) for piece in _cut(topics[name])]
    Random(0).shuffle(texts)
    return iter(texts[len(texts) // 4 :]), iter(texts[: len(texts) // 4])


def _parted(
    found: Iterable[Path], read: Callable[[str], str] = lambda text: text
) -> tuple[Iterator[str], Iterator[str]]:
    copies = {(file.name, file.stat().st_size): file for file in sorted(found)}
    files = list(copies.values())
    Random(0).shuffle(files)
    held = len(files) // 9
    return _pieces(files[held:], read), _pieces(files[:held], read)


def _pieces(files: Iterable[Path], read: Callable[[str], str]) -> Iterator[str]:
    for file in files:
        yield from _cut(read(file.read_text(encoding="utf-8", errors="replace")))


def _said(source: str) -> str:
    """The docstrings of a module."""
    nodes = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


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
