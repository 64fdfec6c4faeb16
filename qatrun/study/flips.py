"""Items that the twin and an arm answer differently, to be looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qatrun.errors import DamagedFileError
from qatrun.evaluate.scores import Scores, TaskScore
from qatrun.files import read_json
from qatrun.layout import SAMPLES, ArmFolder, StudyFolder
from qatrun.records.training import Result
from qatrun.report.page.content import Flip

SHOWN = 5  # of an arm, a task and a direction
FREE = "demo_"  # tasks whose texts are qatrun's own; of others the licence is not known here


def flipped_items(folder: StudyFolder) -> tuple[Flip, ...]:
    """Of every quantized arm whose answers and whose twin's are there, those that moved most first."""
    found: list[Flip] = []
    for name in sorted(folder.begun):
        arm = folder.arm(name)
        twin = read_json(arm.result, Result).twin if arm.result.is_file() else None
        if twin is None:
            continue
        try:
            answers = Scores.load(folder.arm(twin).eval), Scores.load(arm.eval)
        except DamagedFileError:
            continue
        for task in answers[0].tasks.keys() & answers[1].tasks.keys():
            found += _of_task(arm, answers[0].tasks[task], answers[1].tasks[task])
    return tuple(sorted(found, key=lambda flip: (flip.arm, flip.task)))


def _of_task(arm: ArmFolder, twin: TaskScore, now: TaskScore) -> Iterator[Flip]:
    if {*twin.items.item_id} != {*now.items.item_id}:
        return
    there = now.items.places(twin.items.item_id)
    shift = now.items.loglikelihood[there] - twin.items.loglikelihood
    correct = now.items.correct[there]
    texts = _texts(arm.eval / SAMPLES, twin.task)
    for to_wrong in (True, False):
        turned = np.flatnonzero((twin.items.correct != correct) & (twin.items.correct == to_wrong))
        for row in turned[np.argsort(-np.abs(shift[turned]), kind="stable")][:SHOWN]:
            name = str(twin.items.item_id[row])
            item, answer = texts.get(name.split(":")[1], (name, ""))
            yield Flip(arm.path.name, twin.task, item, answer, to_wrong, float(shift[row]))


def _texts(samples: Path, task: str) -> dict[str, tuple[str, str]]:
    """Number of an item -> its question and right answer, where they may be shown and were kept."""
    file = samples / f"{task}.jsonl"
    if not task.startswith(FREE) or not file.is_file():
        return {}
    rows: Sequence[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {str(row["doc_id"]): (row["doc"]["query"], row["doc"]["choices"][row["target"]]) for row in rows}
