"""Per-item results of one model on its tasks, and the folder they are kept in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from qatrun.errors import DamagedFileError, Problem
from qatrun.files import read_json, reading, replace_file, sha256
from qatrun.layout import ITEMS_FILE, SCORES_FILE
from qatrun.records.scores import ScoresSummary, TaskSummary


@dataclass(frozen=True, eq=False)
class ItemScores:
    """What a model did on each item; row i of every array is the same item.

    Attributes:
        item_id: [num_items] str, `<leaf task>:<number>:<hash of question, prompt and answer>`: equal where the same
            item was asked in the same words.
        correct: [num_items] bool, by the task's metric.
        loglikelihood: [num_items] float64, nats, of the right answer's text given the prompt (summed over its tokens).
        choice_loglikelihoods: [num_items, max_choices] float64, nats; NaN beyond an item's own choices.
    """

    item_id: npt.NDArray[np.str_]
    correct: npt.NDArray[np.bool_]
    loglikelihood: npt.NDArray[np.float64]
    choice_loglikelihoods: npt.NDArray[np.float64]

    def places(self, item_id: npt.NDArray[np.str_]) -> npt.NDArray[np.intp]:
        """Row of each of these items, all of which it must have: what pairs two models' answers."""
        order = np.argsort(self.item_id)
        return order[np.searchsorted(self.item_id, item_id, sorter=order)]


@dataclass(frozen=True, eq=False)
class TaskScore:
    """One task (or group of tasks, such as mmlu) answered by one model.

    Attributes:
        task: name or path in the recipe.
        metric: lm-eval's name of what `correct` means, such as `acc_norm`.
        num_truncated: requests (one per choice) whose prompt did not fit the model's context and lost its beginning.
        num_answer_tokens: of the right answers, all items together.
        others: every other metric that lm-eval gives by item -> its mean over items.
    """

    task: str
    metric: str
    num_fewshot: int
    num_truncated: int
    num_answer_tokens: int
    items: ItemScores
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        return len(self.items.correct)

    @property
    def accuracy(self) -> float:
        """Share of items answered right, in [0, 1]; in a group each item counts the same (`weight_by_size`)."""
        return float(self.items.correct.mean())

    @property
    def stderr(self) -> float | None:
        """Standard error of `accuracy` over items, the sample estimate that lm-eval prints; None for a single item."""
        if self.num_items < 2:
            return None
        return math.sqrt(self.accuracy * (1.0 - self.accuracy) / (self.num_items - 1))


@dataclass(frozen=True, eq=False)
class Scores:
    """One model on all its tasks.

    Attributes:
        settings: what must be equal for two models' scores to be compared; JSON values.
    """

    tasks: Mapping[str, TaskScore]
    settings: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write `items.parquet`, then `scores.json` with its checksum; each file appears whole or not at all."""
        sink = pa.BufferOutputStream()
        pq.write_table(_items_table(self.tasks), sink)
        items = sink.getvalue().to_pybytes()
        replace_file(folder / ITEMS_FILE, items)
        summary = ScoresSummary(
            settings=dict(self.settings),
            tasks={name: _summary(score) for name, score in self.tasks.items()},
            items_sha256=hashlib.sha256(items).hexdigest(),
        )
        replace_file(folder / SCORES_FILE, json.dumps(summary.to_dict(), indent=2, allow_nan=False).encode())

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            DamagedFileError: no scores in the folder, or its two files are torn or do not belong together.
        """
        summary_path, items_path = folder / SCORES_FILE, folder / ITEMS_FILE
        if not (summary_path.is_file() and items_path.is_file()):
            raise DamagedFileError(
                Problem(f"no scores here ({SCORES_FILE} and {ITEMS_FILE} belong together)", where=str(folder))
            )
        summary = read_json(summary_path, ScoresSummary)
        with reading(items_path):
            checksum = sha256(items_path)
        if checksum != summary.items_sha256:
            raise DamagedFileError(
                Problem(f"{ITEMS_FILE} is not the file that {SCORES_FILE} was written with", where=str(folder))
            )
        with reading(items_path):
            table = pq.read_table(items_path)
            tasks = {name: _task_score(name, about, table, folder) for name, about in summary.tasks.items()}
        return cls(tasks, summary.settings)


def pad_choices(rows: list[list[float]]) -> npt.NDArray[np.float64]:
    """Rows of any length -> [num_rows, longest], NaN where a row has ended."""
    padded = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def _summary(score: TaskScore) -> TaskSummary:
    return TaskSummary(
        metric=score.metric,
        num_fewshot=score.num_fewshot,
        num_items=score.num_items,
        num_truncated=score.num_truncated,
        num_answer_tokens=score.num_answer_tokens,
        accuracy=score.accuracy,
        stderr=score.stderr,
        mean_loglikelihood=float(score.items.loglikelihood.mean()),
        others=dict(score.others),
    )


def _task_score(name: str, about: TaskSummary, table: pa.Table, folder: Path) -> TaskScore:
    if about.num_answer_tokens is None:
        message = "scored by an earlier version: delete this folder to score again"
        raise DamagedFileError(Problem(message, where=str(folder)))
    rows = table.filter(pa.compute.equal(table["task"], name))
    items = ItemScores(
        item_id=np.array(rows["item_id"].to_pylist()),
        correct=rows["correct"].to_numpy(),
        loglikelihood=rows["loglikelihood"].to_numpy(),
        choice_loglikelihoods=pad_choices(rows["choice_loglikelihoods"].to_pylist()),
    )
    return TaskScore(
        name, about.metric, about.num_fewshot, about.num_truncated, about.num_answer_tokens, items, about.others
    )


def _items_table(tasks: Mapping[str, TaskScore]) -> pa.Table:
    return pa.concat_tables(
        pa.table(
            {
                "task": pa.array([name] * score.num_items),
                "item_id": pa.array(score.items.item_id.tolist()),
                "correct": pa.array(score.items.correct),
                "loglikelihood": pa.array(score.items.loglikelihood),
                "choice_loglikelihoods": pa.array([row[~np.isnan(row)] for row in score.items.choice_loglikelihoods]),
            }
        )
        for name, score in tasks.items()
    )
