"""Documents in an order that is a function of the seed alone, from a position that can be saved.

A map-style data set is read in a permutation an epoch. A stream cannot be permuted as a whole: blocks of documents are
read and permuted within themselves. A position is plain data and small: a stream's holds where its block begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import datasets
import numpy as np

from qatrun.data.columns import Document, all_held_out
from qatrun.data.dataset import FEATURES, Record, document_of, open_dataset, reading_on, record
from qatrun.errors import InputError
from qatrun.recipe import Source

STREAM_BLOCK = 1000


class Documents(Protocol):
    """Endless rows: after the last one the next epoch begins.

    Attributes:
        key: the source's key in the recipe, for messages.
        epoch: how many passes are complete, the one under way left out.
    """

    key: str
    epoch: int

    def take(self, count: int) -> list[Document | None]:
        """The next rows, `count` of them or, at the end of an epoch, fewer; never none. None for a row without text.

        Raises:
            SourceError: the data set breaks off. The position is that of the last rows taken.
        """

    def position(self) -> dict[str, Any]:
        """Where the next `take` begins, as plain data."""

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to a saved position."""


class MapDocuments:
    """Rows of a data set that knows its length; its first `skip` rows are left out (held out)."""

    def __init__(self, dataset: datasets.Dataset, source: Source, key: str, *, seed: int, skip: int = 0) -> None:
        self.dataset, self.source, self.key, self.seed = dataset, source, key, seed
        self.indices = np.arange(skip, len(dataset))
        self.epoch, self.index = 0, 0
        self._order = self._order_of_epoch()

    def take(self, count: int) -> list[Document | None]:
        if self.index == len(self._order):
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._order_of_epoch()
        chosen = self._order[self.index : self.index + count]
        with reading_on(self.source, self.key):
            columns = self.dataset[chosen]
        self.index += len(chosen)
        rows = zip(*columns.values(), strict=True)
        return [
            document_of(dict(zip(columns, row, strict=True)), self.source, self.key, int(index))
            for index, row in zip(chosen, rows, strict=True)
        ]

    def position(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index}

    def seek(self, position: Mapping[str, Any]) -> None:
        self.epoch, self.index = position["epoch"], position["index"]
        self._order = self._order_of_epoch()

    def _order_of_epoch(self) -> np.ndarray[Any, Any]:
        if not self.source.shuffle:
            return self.indices
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.indices)


class StreamDocuments:
    """Rows of a stream, shuffled block by block; its first `skip` rows are left out (held out) in every epoch."""

    def __init__(self, stream: datasets.IterableDataset, source: Source, key: str, *, seed: int, skip: int = 0) -> None:
        self.stream, self.source, self.key, self.seed = (stream.skip(skip) if skip else stream), source, key, seed
        self.start = self.stream.state_dict()
        self.epoch, self.num_blocks = 0, 0
        self._begin_block(self.start)

    def take(self, count: int) -> list[Document | None]:
        if self.index == len(self._block):
            self._begin_block(self.stream.state_dict())
        rows = self._block[self.index : self.index + count]
        self.index += len(rows)
        return [document_of(row, self.source, self.key) for row in rows]

    def position(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "num_blocks": self.num_blocks,
            "block_start": self._block_start,
            "index": self.index,
        }

    def seek(self, position: Mapping[str, Any]) -> None:
        self.epoch, self.num_blocks = position["epoch"], position["num_blocks"] - 1
        self._begin_block(position["block_start"])
        self.index = position["index"]

    def _begin_block(self, start: dict[str, Any]) -> None:
        rows, epoch = self._read_block(start), self.epoch
        if not rows:
            epoch, start = epoch + 1, self.start
            rows = self._read_block(start)
        if not rows:
            raise InputError(all_held_out(None, self.key))
        self.epoch, self.num_blocks = epoch, self.num_blocks + 1
        order = np.random.default_rng([self.seed, self.num_blocks]).permutation(len(rows))
        self._block = [rows[i] for i in order] if self.source.shuffle else rows
        self._block_start, self.index = start, 0

    def _read_block(self, start: dict[str, Any]) -> list[Record]:
        with reading_on(self.source, self.key):
            self.stream.load_state_dict(start)
            return list(islice(self.stream, STREAM_BLOCK))


def open_documents(source: Source, key: str, *, seed: int, skip: int = 0) -> Documents:
    """The documents of a source.

    Args:
        key: the source's key in the recipe, for messages.
        skip: rows at the start that are held out.
    Raises:
        InputError: as for `open_dataset`, or no rows are left.
    """
    dataset = open_dataset(source, key)
    if isinstance(dataset, datasets.IterableDataset):
        return StreamDocuments(dataset, source, key, seed=seed, skip=skip)
    if len(dataset) <= skip:
        raise InputError(all_held_out(len(dataset), key))
    return MapDocuments(dataset, source, key, seed=seed, skip=skip)


def of_rows(rows: Sequence[Document | None], source: Source, key: str) -> Documents:
    """Documents that are at hand, in their order."""
    dataset = datasets.Dataset.from_list([record(row, source) for row in rows], features=FEATURES)
    return MapDocuments(dataset, source.model_copy(update={"shuffle": False}), key, seed=0)
