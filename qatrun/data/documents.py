"""Documents in an order that is a function of the seed alone, from a position that can be saved.

A map-style data set is read in a permutation an epoch. A stream cannot be permuted as a whole: blocks of documents are
read and permuted within themselves. A position is plain data and small: a stream's holds where its block begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np

from qatrun import demo
from qatrun.data.columns import Row, check_column, demo_texts
from qatrun.errors import InputError, Problem
from qatrun.recipe import Source

STREAM_BLOCK = 1000
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class Documents(Protocol):
    """Endless rows: after the last one the next epoch begins.

    Attributes:
        key: the source's key in the recipe, for messages.
        epoch: how many passes are complete, the one under way left out.
    """

    key: str
    epoch: int

    def take(self, count: int) -> list[Row]:
        """The next rows, `count` of them or, at the end of an epoch, fewer; never none."""

    def position(self) -> dict[str, Any]:
        """Where the next `take` begins, as plain data."""

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to a saved position."""


class MapDocuments:
    """Rows of a data set that knows its length; its first `skip` rows are left out (held out)."""

    def __init__(self, dataset: datasets.Dataset, key: str, *, seed: int, shuffle: bool, skip: int = 0) -> None:
        self.dataset, self.key, self.seed, self.shuffle = dataset, key, seed, shuffle
        self.indices = np.arange(skip, len(dataset))
        self.epoch, self.index = 0, 0
        self._order = self._order_of_epoch()

    def take(self, count: int) -> list[Row]:
        if self.index == len(self._order):
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._order_of_epoch()
        chosen = self._order[self.index : self.index + count]
        self.index += len(chosen)
        columns = self.dataset[chosen]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def position(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index}

    def seek(self, position: Mapping[str, Any]) -> None:
        self.epoch, self.index = position["epoch"], position["index"]
        self._order = self._order_of_epoch()

    def _order_of_epoch(self) -> np.ndarray[Any, Any]:
        return (
            np.random.default_rng([self.seed, self.epoch]).permutation(self.indices) if self.shuffle else self.indices
        )


class StreamDocuments:
    """Rows of a stream, shuffled block by block; its first `skip` rows are left out (held out) in every epoch."""

    def __init__(self, stream: datasets.IterableDataset, key: str, *, seed: int, shuffle: bool, skip: int = 0) -> None:
        self.stream, self.key, self.seed, self.shuffle = (stream.skip(skip) if skip else stream), key, seed, shuffle
        self.start = self.stream.state_dict()
        self.epoch, self.num_blocks = 0, 0
        self._begin_block(self.start)

    def take(self, count: int) -> list[Row]:
        if self.index == len(self._block):
            self._begin_block(self.stream.state_dict())
        rows = self._block[self.index : self.index + count]
        self.index += len(rows)
        return rows

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
        rows = self._read_block(start)
        if not rows:
            self.epoch, start = self.epoch + 1, self.start
            rows = self._read_block(start)
        if not rows:
            raise InputError(Problem("no rows are left beyond those held out", key=f"{self.key}.path"))
        self.num_blocks += 1
        order = np.random.default_rng([self.seed, self.num_blocks]).permutation(len(rows))
        self._block = [rows[i] for i in order] if self.shuffle else rows
        self._block_start, self.index = start, 0

    def _read_block(self, start: dict[str, Any]) -> list[Row]:
        self.stream.load_state_dict(start)
        return list(islice(self.stream, STREAM_BLOCK))


def open_documents(source: Source, key: str, *, seed: int, skip: int = 0) -> Documents:
    """The documents of a source.

    Args:
        key: the source's key in the recipe, for messages.
        skip: rows at the start that are held out.
    Raises:
        InputError: no such data set, split or column, or no rows.
    """
    dataset = open_dataset(source, key)
    if isinstance(dataset, datasets.IterableDataset):
        return StreamDocuments(dataset, key, seed=seed, shuffle=source.shuffle, skip=skip)
    if len(dataset) <= skip:
        raise InputError(Problem(f"only {len(dataset)} rows, and {skip} are held out", key=f"{key}.path"))
    return MapDocuments(dataset, key, seed=seed, shuffle=source.shuffle, skip=skip)


def open_dataset(source: Source, key: str) -> datasets.Dataset | datasets.IterableDataset:
    """The data set of a source, its column checked. Fetches no more than it must: a stream only its first row.

    Raises:
        InputError: as for `open_documents`, or a column that holds something else than text or conversations.
    """
    try:
        dataset = _load(source, key)
        first = next(iter(dataset.take(1)), None)
    except StopIteration:  # how `datasets` takes an empty JSON file
        first = None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = "split" if isinstance(error, ValueError) and "split" in str(error) else "path"
        raise InputError(Problem(f"{source.path}: {_reason(error)}", key=f"{key}.{where}")) from error
    if first is None:
        raise InputError(Problem(f"{source.path} has no rows", key=f"{key}.path"))
    return dataset.select_columns([check_column(source, first, key)])


def _reason(error: Exception) -> str:
    """The first line that says what is wrong; `datasets` wraps a file it cannot read in an error that does not."""
    told = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
    return str(told).strip().split("\n")[0]


def _load(source: Source, key: str) -> Any:
    if source.path == demo.BUILTIN:
        return datasets.Dataset.from_dict({"text": list(demo_texts(source, key))})
    options: dict[str, Any] = {"split": source.split, "streaming": source.streaming}
    path = Path(source.path).expanduser()
    if path.suffix in BUILDERS and not path.is_file():
        raise InputError(Problem(f"no such file '{source.path}'", key=f"{key}.path"))
    try:
        if path.is_file():
            if path.suffix == ".txt":
                options["sample_by"] = "paragraph"
            return datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), **options)
        return datasets.load_dataset(str(path) if path.is_dir() else source.path, source.subset, **options)
    except KeyError:
        endings = ", ".join(BUILDERS)
        raise InputError(Problem(f"'{source.path}' is none of {endings}", key=f"{key}.path")) from None
