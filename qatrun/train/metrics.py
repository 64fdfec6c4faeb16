"""`metrics.jsonl`: one line an optimizer step, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

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

    def close(self) -> None:
        self._stream.close()
