"""`metrics.jsonl`: one line an optimizer step, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

# What no two runs agree on, however equal they are otherwise.
CLOCK_FIELDS = ("seconds", "tokens_per_second")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file in order; a last line that a crash cut short is left out."""
    rows: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricsFile:
    """Appends rows to `metrics.jsonl`, each flushed so that a reader sees the run as it goes."""

    def __init__(self, file: Path, *, from_step: int, inherited: Path | None = None) -> None:
        """Continue after `from_step` steps: what the file, or a new arm's trunk's, says of later ones is dropped."""
        source = file if file.is_file() else inherited
        rows = read_metrics(source) if source is not None and source.is_file() else []
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= from_step)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(kept, encoding="utf-8")
        temporary.replace(file)
        self._stream: TextIO = file.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
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
