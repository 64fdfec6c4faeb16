"""seeds.json: what the seeds of a study say together, and the contrasts that its recipe asks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qatrun.files import Record
from qatrun.records.comparison import OverPtq, TrainingComparison
from qatrun.records.values import Interval, Verdict

Answer = Literal["helps", "hurts", "no effect shown"]


class TaskOfSeeds(Record):
    """One arm on some items. Lists hold a value for each seed; drops are against the twin of the same seed, None without
    one.

    Attributes:
        mean: of the accuracies; `sd` their standard deviation, None for one seed, as those of drops are.
        drop_ci95_pp: over items and seeds together; `drop_ci95_items_pp` and `drop_ci95_seeds_pp` over either alone.
        budget_pp: None over all tasks together, which have none.
    """

    num_items: int
    accuracy: list[float]
    mean: float
    sd: float | None
    drop_pp: list[float] | None
    drop_mean_pp: float | None
    drop_sd_pp: float | None
    drop_ci95_pp: Interval | None
    drop_ci95_items_pp: Interval | None
    drop_ci95_seeds_pp: Interval | None
    budget_pp: float | None
    verdict: Verdict | None


class TextOfSeeds(Record):
    """Held-out perplexity of an arm over its twin's, in percent, a value for each seed; fields as of TaskOfSeeds.

    Attributes:
        budget_percent: None: not judged.
    """

    rise_percent: list[float]
    rise_mean_percent: float
    rise_ci95_percent: Interval
    budget_percent: float | None
    verdict: Verdict | None


class ArmOfSeeds(Record):
    """One arm.

    Attributes:
        verdict: the worst of the tasks', of perplexity's and, where it counts, of training's; None without a twin.
        text: None without a twin, and where seeds or arms read other texts.
        training: mean over the seeds; None without a twin.
        loss_ape_percent: "after_switch" -> of each seed; None where it is not known.
        findings: of the diagnosis of each seed; None unless all are diagnosed.
    """

    twin: str | None = None
    label: str | None = None
    verdict: Verdict | None = None
    tasks: dict[str, TaskOfSeeds]
    all_tasks: TaskOfSeeds
    text: TextOfSeeds | None = None
    training: TrainingComparison | None = None
    perplexity: list[float] = Field(default_factory=list)
    loss_ape_percent: dict[str, list[float]] | None = None
    findings: list[list[str]] | None = None

    @property
    def loss_apes(self) -> list[float]:
        """Of each seed after the switch; empty where they are not known."""
        return (self.loss_ape_percent or {}).get("after_switch", [])


class StartTask(Record):
    """The model before training on some items."""

    accuracy: float


class StartOfSeeds(Record):
    """The model before training, which is the same for every seed."""

    tasks: dict[str, StartTask]
    all_tasks: StartTask
    perplexity: float


class Contrast(Record):
    """Accuracy of one arm, `a`, minus that of another, `b`, over all tasks; fields as of TaskOfSeeds.

    Attributes:
        loss_ape_percent: mean distance of their training losses, of each seed; `loss_difference_percent` with its sign.
        effect: of `a` instead of `b`; `answer` says so in a sentence.
    """

    name: str
    a: str
    b: str
    num_items: int
    difference_pp: float
    sd_pp: float | None
    ci95_pp: Interval
    ci95_items_pp: Interval
    ci95_seeds_pp: Interval | None
    per_seed_pp: list[float]
    effect: Answer
    answer: str
    loss_ape_percent: list[float] | None = None
    loss_difference_percent: list[float] | None = None


class Seeds(Record):
    """seeds.json; `verdict` is the worst of the arms', None where none has a twin."""

    study: str
    seeds: list[int]
    verdict: Verdict | None = None
    start: StartOfSeeds
    arms: dict[str, ArmOfSeeds]
    contrasts: list[Contrast] = Field(default_factory=list)
    over_ptq: list[OverPtq] = Field(default_factory=list)
