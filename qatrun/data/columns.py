"""Whether a source holds the column that a recipe names: its first row says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, cast

from qatrun import demo
from qatrun.demo.world import NUM_DOCUMENTS, Split
from qatrun.errors import InputError, Problem
from qatrun.recipe import Source

Row = Mapping[str, Any]


def check_source(source: Source, key: str) -> None:
    """Make sure that a source can be opened and that its column holds text or conversations. Of the demo's documents only
    the first is written.

    Args:
        key: the source's key in the recipe, for messages.
    Raises:
        InputError: as for `open_dataset`.
    """
    if source.path == demo.BUILTIN:
        check_column(source, {"text": next(demo_texts(source, key))}, key)
        return
    from qatrun.data.documents import open_dataset  # `datasets` takes half a second, which the demo need not wait for

    open_dataset(source, key)


def demo_texts(source: Source, key: str) -> Iterator[str]:
    """The demo's documents, each written when it is asked for.

    Raises:
        InputError: no such split.
    """
    if source.split not in NUM_DOCUMENTS:
        raise InputError(Problem(f"the demo has {', '.join(NUM_DOCUMENTS)} (got '{source.split}')", key=f"{key}.split"))
    return demo.documents(cast(Split, source.split))


def check_column(source: Source, first: Row, key: str) -> str:
    """The column that a recipe takes from a source.

    Args:
        first: the source's first row.
        key: the source's key in the recipe, for messages.
    Raises:
        InputError: no such column, or one that holds something else than text or conversations.
    """
    column = source.messages_column or source.text_column
    key = f"{key}.{'messages_column' if source.messages_column else 'text_column'}"
    if column not in first:
        close = get_close_matches(column, first, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"columns: {', '.join(first)}"
        raise InputError(Problem(f"no column '{column}' in {source.path} ({hint})", key=key))
    kind, what = (list, "conversations") if source.messages_column else (str, "text")
    if first[column] is not None and not isinstance(first[column], kind):
        message = f"column '{column}' in {source.path} holds no {what} (first row: {first[column]!r:.60})"
        raise InputError(Problem(message, key=key))
    return column
