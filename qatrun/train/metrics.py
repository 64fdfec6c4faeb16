"""`metrics.jsonl`: one line an optimizer step, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from qatrun.files import read_rows, replace_file, writing
from qatrun.ranks import world
from qatrun.records.training import AlarmRow, MetricsRow

Row = Mapping[str, Any]


def read_metrics(file: Path) -> list[MetricsRow]:
    """The rows of a metrics file in order; a last line that a crash cut short is left out.

    Raises:
        DamagedFileError: it is missing, or holds something else.
    """
    return read_rows(file, MetricsRow)


def read_alarms(file: Path) -> list[AlarmRow]:
    """The rows of alarms.jsonl, as `read_metrics` those of metrics.jsonl; none where there is no file."""
    return read_rows(file, AlarmRow) if file.is_file() else []


def surviving_metrics(file: Path, inherited: Path | None, last_step: int) -> tuple[list[MetricsRow], list[int]]:
    """What is left of the record of the first `last_step` steps: a row for each, the trunk's where the arm's own file
    lacks it.

    Returns:
        (rows in order, steps of which there is none).
    """
    rows: dict[int, MetricsRow] = {}
    for source in filter(None, (inherited, file)):
        if source.is_file():
            rows |= {row["step"]: row for row in read_rows(source, MetricsRow, skip_damaged=True)}
    steps = range(1, last_step + 1)
    return [rows[step] for step in steps if step in rows], [step for step in steps if step not in rows]


def surviving_alarms(file: Path, inherited: Path | None, last_step: int) -> list[AlarmRow]:
    """What a new arm's trunk, or the arm's own file, says of the first `last_step` steps."""
    source = file if file.is_file() or inherited is None else inherited
    rows = read_rows(source, AlarmRow, skip_damaged=True) if source.is_file() else []
    return [row for row in rows if row["step"] <= last_step]


class RowsFile:
    """Appends rows to a .jsonl file, each flushed so that a reader sees the run as it goes. Of several processes the first
    writes it; on the others rows go nowhere."""

    def __init__(self, file: Path, rows: Iterable[Row]) -> None:
        """Begin with these rows, whatever the file held."""
        if world().leads:
            replace_file(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = file if world().leads else Path(os.devnull)
        self._stream: TextIO = self._file.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        with writing(self._file):
            self._stream.write(json.dumps(row) + "\n")
            self._stream.flush()

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        if self._file != Path(os.devnull):  # which cannot be waited for
            with writing(self._file):
                os.fsync(self._stream.fileno())

    def close(self) -> None:
        with writing(self._file):
            self._stream.close()


class PendingRows:
    """Rows whose numbers are still being computed on the device; asking for each at once would make it wait."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._began = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def begin_step(self) -> None:
        """Start the clock, unless a step that is still pending did."""
        if not self._rows:
            self._began = time.perf_counter()

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row; its values are plain or [] tensors."""
        self._rows.append(row)

    def take(self) -> tuple[list[dict[str, Any]], float]:
        """All rows in plain numbers, brought here in one transfer, and the seconds that each step took on average."""
        rows, self._rows = self._rows, []
        tensors = [value for row in rows for value in row.values() if isinstance(value, Tensor)]
        numbers = iter(torch.stack([tensor.double() for tensor in tensors]).tolist())
        plain = [{key: _plain(value, numbers) for key, value in row.items()} for row in rows]
        return plain, (time.perf_counter() - self._began) / len(rows)


def _plain(value: Any, numbers: Iterator[float]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return next(numbers) if value.is_floating_point() else int(next(numbers))
