"""One cell: what was planted, what it cost by measures that the diagnosis does not see, and what was answered."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock
from pydantic import Field

from qatrun.files import Record, read_json, write_json
from qatrun.records.diagnosis import Cause

CELLS_FILE = "cells.json"


class Nats(Record):
    """What a model makes of the rule's texts and questions.

    Attributes:
        own, new: nats a token of each sequence of the kind that the start model was trained on, and of the other kind.
        answer: nats of the right answer's text, for each question; empty where none are asked.
    """

    own: list[float]
    new: list[float]
    answer: list[float]


class Cell(Record):
    """One diagnosed arm.

    Attributes:
        study: which, and `fault` what was planted in it; `arm` its name there.
        probe: whether the recipe names text that the model knew.
        start, twin, on: models before training, in BF16 after it, and as deployed.
        answer_tokens: of an answer that the rule looks at, in the mean.
        answers: cause -> what the diagnosis says; empty where it refused.
        refused: why.
        warned: what was said of the training text before the first step.
        alarms: kind -> step of the first.
    """

    model: str
    seed: int
    study: str
    arm: str
    format: str
    fault: str
    text: str
    probe: bool
    start: Nats
    twin: Nats
    on: Nats
    answer_tokens: float = 0.0
    answers: dict[str, Cause]
    sentence: str
    refused: str = ""
    warned: list[str] = Field(default_factory=list)
    alarms: dict[str, int]

    @property
    def key(self) -> tuple[str, int, str, str]:
        return self.model, self.seed, self.study, self.arm


class Cells(Record):
    """cells.json of a model and seed."""

    cells: list[Cell]


def keep(file: Path, new: list[Cell]) -> None:
    """Put these cells in the file, in place of earlier ones of the same study and arm; studies may run side by side."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        before = read_json(file, Cells).cells if file.is_file() else []
        found = {cell.key: cell for cell in (*before, *new)}
        write_json(file, Cells(cells=list(found.values())))


def read_cells(output: Path) -> list[Cell]:
    """Of every model and seed there."""
    return [cell for file in sorted(output.glob(f"*/seed-*/{CELLS_FILE}")) for cell in read_json(file, Cells).cells]
