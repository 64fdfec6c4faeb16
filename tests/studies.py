"""What tests of whole studies look at: files by content, and what of a study neither clock nor interruption changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qatrun.report import TerminalDisplay
from qatrun.train.metrics import read_metrics

# What no two runs agree on, however equal they are otherwise.
CLOCK_FIELDS = ("seconds", "tokens_per_second")
SHORT = ("--set", "train.steps=4", "--set", "warmup.steps=2")


def checksums(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def outcome(study: Path) -> dict[str, Any]:
    """All of a study that does not depend on the clock or on when it was interrupted."""
    comparison = read(study / "comparison.json")
    kept: dict[str, Any] = {"pairs": [{**pair, "cost": None} for pair in comparison["pairs"]]}
    for arm in ("bf16", "hif8"):
        kept[arm] = {
            "files": {
                name: digest
                for name, digest in checksums(study / arm).items()
                if name.endswith((".safetensors", ".parquet")) and ("step-" not in name or "step-000040" in name)
            },
            "metrics": [
                {key: value for key, value in row.items() if key not in CLOCK_FIELDS}
                for row in read_metrics(study / arm / "metrics.jsonl")
            ],
            "match": read(study / arm / "result.json")["match"],
        }
    return kept


def interrupt_at(monkeypatch: pytest.MonkeyPatch, segment: str, step: int, interrupt: Callable[[], None]) -> None:
    """Do something to the process after a step of a segment."""
    on_step = TerminalDisplay.on_step

    def on_step_then_interrupt(self: TerminalDisplay, row: Mapping[str, Any]) -> None:
        on_step(self, row)
        if self._what == f"training {segment}" and row["step"] == step:
            interrupt()

    monkeypatch.setattr(TerminalDisplay, "on_step", on_step_then_interrupt)
