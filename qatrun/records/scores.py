"""Scores of a model: scores.json, and what `qatrun eval` prints. Their items are in items.parquet."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from qatrun.files import Record
from qatrun.records.export import EngineMatch
from qatrun.records.values import Interval, Number, Step


class TaskSummary(Record):
    """A task in scores.json.

    Attributes:
        metric: lm-eval's name of what counts as right, such as `acc_norm`.
        num_truncated: requests whose prompt did not fit the model's context and lost its beginning.
        num_answer_tokens: of the right answers, all items together; None: an earlier version did not count them.
        accuracy: share of items answered right; `stderr` its standard error over items, None for a single item.
        mean_loglikelihood: nats, of the right answer.
        others: every other metric that lm-eval gives by item -> its mean.
    """

    metric: str
    num_fewshot: Step
    num_items: Step | None = None
    num_truncated: Step
    num_answer_tokens: Step | None = None
    accuracy: float | None = None
    stderr: float | None = None
    mean_loglikelihood: float | None = None
    others: dict[str, float] = Field(default_factory=dict)


class ScoresSummary(Record):
    """scores.json; `settings` are what must be equal for two models' scores to be compared."""

    settings: dict[str, Any]
    tasks: dict[str, TaskSummary]
    items_sha256: str


STRATA = (
    "common",
    "middling",
    "rare",
)  # of a text's targets, about a third each, by how often their token occurs there


class TextScore(Record):
    """One model on one text; a row is a sequence.

    Attributes:
        text: SHA-256 of its tokens and of which of them count: equal where two models read the same.
        nats: [num_sequences, len(STRATA)], negative log-likelihood of the targets of each stratum, summed.
        num_targets: [num_sequences, len(STRATA)], how many those are.
        entropy: nats a token of the frequencies of the text's tokens: what guessing by frequency alone would take.
        uniform: nats a token of guessing any token of the vocabulary.
    """

    text: str
    nats: list[list[Number]]
    num_targets: list[list[int]]
    entropy: Number
    uniform: Number

    @property
    def mean(self) -> float:
        """Nats a token."""
        return sum(map(sum, self.nats)) / sum(map(sum, self.num_targets))


class TextScores(Record):
    """text.json: one model on every text that it was asked about: "held-out", and "known" of what the start model knew."""

    texts: dict[str, TextScore]


class ScoredTask(Record):
    """A task of `qatrun eval`; fields as of TaskSummary."""

    name: str
    metric: str
    num_fewshot: int
    num_items: int
    accuracy: float
    stderr: float | None
    num_truncated: int
    others: dict[str, float] = Field(default_factory=dict)


class ReadText(Record):
    """A text that `qatrun eval` read: its perplexity, and the interval of that over its sequences."""

    perplexity: float
    ci95: Interval
    num_sequences: int
    num_tokens: int


class ScoredModel(Record):
    """What `qatrun eval` prints: `model` is what was scored, in words, `output` the folder of its scores if kept.

    Attributes:
        text: None where there was none to read.
        weights: weights file or plan, as it was named -> SHA-256 of what was scored.
        match: how an exported folder compares with what its arm scored.
    """

    model: str
    text: ReadText | None = None
    weights: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, Any]
    tasks: list[ScoredTask]
    output: str | None
    match: EngineMatch | None = None
