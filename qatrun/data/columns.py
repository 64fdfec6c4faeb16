"""The column that a recipe takes from a row, checked: a document, or a problem that names the row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from qatrun import demo
from qatrun.data.turns import Turn, conversation
from qatrun.demo.world import NUM_DOCUMENTS, Split
from qatrun.errors import InputError, Problem
from qatrun.recipe import Source
from qatrun.text import suggestion


class Document(NamedTuple):
    """One document: text or a conversation, and the row it is from, for messages."""

    content: str | list[Turn]
    where: str


def column_key(source: Source, key: str) -> str:
    """The recipe's key that names the column."""
    return f"{key}.{'messages_column' if source.messages_column else 'text_column'}"


def as_document(values: Any, where: str, source: Source, key: str) -> Document | None:
    """The document in a row; None where the row holds none (null or empty).

    Args:
        values: the row's columns.
        where: names the row.
        key: the source's key in the recipe, for messages.
    Raises:
        InputError: no such column, or one that holds something else than text or a conversation.
    """
    if not isinstance(values, Mapping):
        raise InputError(Problem(f"{where}: no mapping of columns to values (got {values!r:.60})", key=f"{key}.path"))
    column = source.column
    key = column_key(source, key)
    if column not in values:
        hint = suggestion(column, values, otherwise=f"columns: {', '.join(values)}")
        # Where the first row lacks it, the file does.
        raise InputError(Problem(f"no column '{column}' in {where.removesuffix(', row 1')}{hint}", key=key))
    content = values[column]
    if content is None or content in ("", []):
        return None
    try:
        return Document(
            conversation(content, source.roles) if source.messages_column else _text(content, column), where
        )
    except ValueError as error:
        raise InputError(Problem(f"{where}: {error}", key=key)) from None


def all_held_out(num_rows: int | None, key: str) -> Problem:
    """What is wrong where nothing is left to train on."""
    which = "the one document is" if num_rows == 1 else f"all {num_rows} documents are" if num_rows else "all of it is"
    return Problem(f"{which} held out for perplexity, and none is left to train on: give data.valid", key=f"{key}.path")


def demo_documents(source: Source, key: str) -> Iterator[Document | None]:
    """The demo's documents, each written when it is asked for.

    Raises:
        InputError: no such split.
    """
    if source.split not in NUM_DOCUMENTS:
        raise InputError(Problem(f"the demo has {', '.join(NUM_DOCUMENTS)} (got '{source.split}')", key=f"{key}.split"))
    texts = demo.documents(cast(Split, source.split))
    return (as_document({"text": text}, f"{source.path}, row {n}", source, key) for n, text in enumerate(texts, 1))


def _text(content: Any, column: str) -> str:
    if not isinstance(content, str):
        raise ValueError(f"column '{column}' holds no text (got {content!r:.60})")
    content.encode()  # half of a surrogate pair, which JSON can spell, is no character
    return content
