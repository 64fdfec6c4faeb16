"""Scores of a model: scores.json, and what `qatrun eval` prints. Their items are in items.parquet."""

from __future__ import annotations

from typing import Any

from qatrun.files import Record
from qatrun.records.export import EngineMatch
from qatrun.records.values import Step


class TaskSummary(Record):
    """A task in scores.json.

    Attributes:
        metric: lm-eval's name of what counts as right, such as `acc_norm`.
        num_truncated: requests whose prompt did not fit the model's context and lost its beginning.
        num_answer_tokens: of the right answers, all items together; None: an earlier version did not count them.
        accuracy: share of items answered right; `stderr` its standard error over items, None for a single item.
        mean_loglikelihood: nats, of the right answer.
    """

    metric: str
    num_fewshot: Step
    num_items: Step | None = None
    num_truncated: Step
    num_answer_tokens: Step | None = None
    accuracy: float | None = None
    stderr: float | None = None
    mean_loglikelihood: float | None = None


class ScoresSummary(Record):
    """scores.json; `settings` are what must be equal for two models' scores to be compared."""

    settings: dict[str, Any]
    tasks: dict[str, TaskSummary]
    items_sha256: str


class ScoredTask(Record):
    """A task of `qatrun eval`; fields as of TaskSummary."""

    name: str
    metric: str
    num_fewshot: int
    num_items: int
    accuracy: float
    stderr: float | None
    num_truncated: int


class ScoredModel(Record):
    """What `qatrun eval` prints: `model` is what was scored, in words, `output` the folder of its scores if kept, `match`
    how an exported folder compares with what its arm scored."""

    model: str
    settings: dict[str, Any]
    tasks: list[ScoredTask]
    output: str | None
    match: EngineMatch | None
