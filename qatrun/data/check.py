"""What can be known of a recipe's data before a run: a sample of every source, read, templated and tokenized.

Files that the sample covers whole are held to all that a run would hold them to. The demo's documents are right as they
are: only the first is written, and `datasets`, which takes half a second to import, is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qatrun import demo
from qatrun.data.columns import Document, all_held_out, column_key, demo_documents
from qatrun.data.encoding import encoder
from qatrun.data.randomness import drawn_at_random
from qatrun.errors import InputError, Problem
from qatrun.recipe import DataConfig, Source

SAMPLE_ROWS = 1000
SAMPLE_CHARACTERS = 500_000
COUNTED_CHARACTERS = 50_000_000  # a second or two


@dataclass(frozen=True)
class Sample:
    """The first rows of a source.

    Attributes:
        rows: a text longer than what is left of the sample is cut; None for a row without one.
        ended: there are no more rows.
        whole: there are no more rows, and none was cut.
    """

    source: Source
    key: str
    rows: list[Document | None]
    ended: bool
    whole: bool

    @property
    def documents(self) -> list[Document]:
        return [row for row in self.rows if row is not None]


def check_data(
    config: DataConfig, tokenizer: Any | None, warn: Callable[[Problem], None] = lambda _: None
) -> list[Problem]:
    """What stands in the way of training on this data, as far as a sample shows it.

    Args:
        tokenizer: None where there is none that can be read; then rows and columns alone are looked at.
        warn: told of what would train, but hardly be meant.
    """
    problems: list[Problem] = []
    samples: dict[str, Sample] = {}
    for name in ("train", "valid", "probe"):
        source = getattr(config, name)
        if source is None:
            continue
        try:
            samples[name] = _sample(source, f"data.{name}")
            _look_for_order(samples[name], warn)
            if tokenizer is not None:
                _check_targets(samples[name], tokenizer)
        except InputError as error:
            problems += error.problems
    if not problems and tokenizer is not None:
        try:
            _check_held_out(config, samples, tokenizer)
        except InputError as error:
            problems += error.problems
    return problems


def count_tokens(source: Source, key: str, tokenizer: Any) -> int | None:
    """Tokens of one pass over a source, about: as many a character as in its first documents. None where they are not
    counted: beyond COUNTED_CHARACTERS, in a stream, on the hub.

    Raises:
        InputError: as for `check_data`.
    """
    if source.path != demo.BUILTIN:
        from qatrun.data.dataset import local_files

        if source.streaming or local_files(source, key) is None:
            return None
    sample: list[Document] = []
    sampled = counted = 0
    for row in _rows(source, key):
        if row is None:
            continue
        counted += len(str(row.content))
        if not sample or counted <= SAMPLE_CHARACTERS:
            sample.append(row)
            sampled = counted
        if counted > COUNTED_CHARACTERS:
            return None
    tokens = sum(len(ids) for ids, _ in encoder(source, key, tokenizer)(sample))
    return round(tokens * counted / sampled) if sampled else None


def _sample(source: Source, key: str) -> Sample:
    rows: list[Document | None] = []
    left, is_cut = SAMPLE_CHARACTERS, False
    for row in _rows(source, key):
        if row is not None and isinstance(row.content, str) and len(row.content) > left:
            row, is_cut = row._replace(content=row.content[:left]), True
        left -= len(str(row.content)) if row is not None else 0
        rows.append(row)
        # A second row is always looked for: a corpus of one document is told from the first of many.
        if source.path == demo.BUILTIN or len(rows) == SAMPLE_ROWS or (left <= 0 and len(rows) > 1):
            return Sample(source, key, rows, ended=False, whole=False)
    if not rows:
        raise InputError(Problem(f"{source.path} has no rows", key=f"{key}.path"))
    return Sample(source, key, rows, ended=True, whole=not is_cut)


def _rows(source: Source, key: str) -> Iterator[Document | None]:
    if source.path == demo.BUILTIN:
        return demo_documents(source, key)
    from qatrun.data.dataset import read_documents

    return read_documents(source, key)


def _check_targets(sample: Sample, tokenizer: Any) -> None:
    """Tokenize the sample; refuse one in which the loss counts nothing."""
    source, documents = sample.source, sample.documents
    encoded = encoder(source, sample.key, tokenizer)(documents)
    if any(any(counted) for _, counted in encoded) or not (documents or sample.ended):
        return
    if source.messages_column is None or not documents:
        raise InputError(Problem(f"{source.path} has rows but no text to train on", key=f"{sample.key}.path"))
    found = dict.fromkeys(turn["role"] for document in documents for turn in document.content if isinstance(turn, dict))
    which = "conversations" if sample.ended else f"first {len(documents):,} conversations"
    message = (
        f"no token of the {which} in {source.path} is counted by the loss (roles found: {', '.join(found)}; 'assistant' "
        f"expected: write `roles: {{<role of the answers>: assistant}}`)"
    )
    if "assistant" in found:
        message = f"no token of the {which} in {source.path} is counted by the loss: the chat template marks no answer"
    raise InputError(Problem(message, key=column_key(source, sample.key)))


def _look_for_order(sample: Sample, warn: Callable[[Problem], None]) -> None:
    """Random text trains as smoothly as any."""
    at_random = drawn_at_random([row.content for row in sample.documents if isinstance(row.content, str)])
    if at_random is not None:
        message = (
            f"the {at_random} of {sample.source.path} follow each other as if drawn at random: is it the right text?"
        )
        warn(Problem(message, f"{sample.key}.path"))


def _check_held_out(config: DataConfig, samples: dict[str, Sample], tokenizer: Any) -> None:
    """Hold out of the sample what a run would hold out of the source, where the sample is all of it."""
    train = samples["train"]
    held_out = samples.get("valid", train)
    num_rows = 0 if config.valid is not None else 1
    if held_out.whole:
        from qatrun.data.documents import of_rows
        from qatrun.data.packing import hold_out

        num_rows = hold_out(config, tokenizer, lambda source, key: of_rows(held_out.rows, source, key))[1]
    if train.ended and num_rows >= len(train.rows):
        raise InputError(all_held_out(len(train.rows), "data.train"))
