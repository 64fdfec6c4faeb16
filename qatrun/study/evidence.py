"""What the seeds of a study say together: arms, their drops, and the contrasts that the recipe asks.

A study of one seed is summarized in the same way, with intervals over items alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from qatrun.evaluate import paired
from qatrun.evaluate.attribution import HELD_OUT
from qatrun.evaluate.comparison import compare_training
from qatrun.evaluate.paired import Bounds, Interval
from qatrun.evaluate.replication import (
    Correct,
    Difference,
    LossGap,
    TextRise,
    correct_of_seeds,
    difference,
    loss_gap,
    text_rise,
)
from qatrun.evaluate.scores import Scores
from qatrun.evaluate.text import load_texts, perplexity
from qatrun.files import read_json
from qatrun.layout import ArmFolder, StudyFolder
from qatrun.recipe import Arm, Recipe
from qatrun.recipe.schema import PERPLEXITY, START, TRAINING
from qatrun.records.comparison import TrainingComparison
from qatrun.records.diagnosis import StudyDiagnosis
from qatrun.records.seeds import ArmOfSeeds, Contrast, Seeds, StartOfSeeds, StartTask, TaskOfSeeds, TextOfSeeds
from qatrun.records.training import ArmResult, MetricsRow, Result
from qatrun.records.values import Verdict
from qatrun.study.over_ptq import over_ptq
from qatrun.study.records import losses
from qatrun.text import interval


def summarize(name: str, recipe: Recipe, studies: Mapping[int, StudyFolder]) -> Seeds:
    """What finished studies of one recipe say together.

    Args:
        recipe: whose arms, budgets and contrasts they are.
        studies: seed -> its folder, one or more.
    """
    evidence = _Evidence.read(recipe, studies)
    arms = {arm: evidence.of_arm(arm) for arm in recipe.arm_names}
    return Seeds(
        study=name,
        seeds=list(studies),
        verdict=paired.worst_verdict(arm.verdict for arm in arms.values()),
        start=evidence.of_start(),
        arms=arms,
        over_ptq=over_ptq(recipe, evidence.studies),
        contrasts=[evidence.of_contrast(question, *pair) for question, pair in recipe.contrasts.items()],
    )


@dataclass(frozen=True)
class _Evidence:
    """Everything that is compared, read once. Lists hold one entry for each seed.

    Attributes:
        scores: arm, or START, -> scores with quantizers on.
        losses: arm -> step -> its row of metrics.
    """

    recipe: Recipe
    arms: Mapping[str, Arm]
    studies: Sequence[StudyFolder]
    scores: Mapping[str, Sequence[Scores]]
    losses: Mapping[str, Sequence[Mapping[int, MetricsRow]]]

    @classmethod
    def read(cls, recipe: Recipe, studies: Mapping[int, StudyFolder]) -> _Evidence:
        folders = tuple(studies.values())
        names = recipe.arm_names
        return cls(
            recipe,
            recipe.arm_by_name,
            folders,
            {name: [Scores.load(folder.arm(name).eval) for folder in folders] for name in (*names, START)},
            {name: [_losses(folder.arm(name)) for folder in folders] for name in names},
        )

    def of_start(self) -> StartOfSeeds:
        """The model before training, the same for every seed."""
        tasks = self.scores[START][0].tasks
        return StartOfSeeds(
            tasks={task: StartTask(accuracy=score.accuracy) for task, score in tasks.items()},
            all_tasks=StartTask(accuracy=float(self._correct(START, self._tasks).mean())),
            perplexity=read_json(self.studies[0].start.result, Result).perplexity["on"],
        )

    def of_arm(self, name: str) -> ArmOfSeeds:
        """One arm: its scores, and what it lost against its twin of the same seed."""
        twin = self.arms[name].twin
        text = None if twin is None else self._text_rise(name, twin)
        verdicts = {} if twin is None else self._verdicts(name, twin, text)
        tasks = {
            task: self._of_tasks(name, twin, [task], self.recipe.budget[task], verdicts.get(task))
            for task in self._tasks
        }
        gaps = [] if twin in (None, START) else self._loss_gaps(name, str(twin))
        return ArmOfSeeds(
            twin=twin,
            label=None,
            verdict=paired.worst_verdict(verdicts.values()),
            tasks=tasks,
            text=None if text is None else self._of_text(text, verdicts.get(PERPLEXITY)),
            training=None if twin is None else self._of_training(name, verdicts.get(TRAINING)),
            all_tasks=self._of_tasks(name, twin, self._tasks),
            perplexity=[read_json(study.arm(name).result, ArmResult).perplexity["on"] for study in self.studies],
            loss_ape_percent={"after_switch": [gap.ape_percent for gap in gaps]} if gaps else None,
            findings=self._findings(name),
        )

    def of_contrast(self, question: str, first: str, second: str) -> Contrast:
        """Accuracy of one arm minus that of another over all tasks, and what their training losses said."""
        found = difference(self._correct(first, self._tasks), self._correct(second, self._tasks))
        gaps = [] if START in (first, second) else self._loss_gaps(first, second)
        return Contrast(
            name=question,
            a=first,
            b=second,
            num_items=self._correct(first, self._tasks).shape[1],
            difference_pp=100 * found.mean,
            sd_pp=_percent(found.sd),
            ci95_pp=_percents(found.interval),
            ci95_items_pp=_percents(found.items),
            ci95_seeds_pp=found.seeds and _percents(found.seeds),
            per_seed_pp=_percents(found.per_seed),
            effect=found.answer,
            answer=_answer(found, first, second),
            loss_ape_percent=[gap.ape_percent for gap in gaps] or None,
            loss_difference_percent=[gap.difference_percent for gap in gaps] or None,
        )

    @property
    def _tasks(self) -> list[str]:
        return list(self.recipe.eval.tasks)

    def _correct(self, name: str, tasks: Sequence[str]) -> Correct:
        return correct_of_seeds(self.scores[name], tasks)

    def _verdicts(self, name: str, twin: str, text: TextRise | None) -> dict[str, Verdict]:
        """Of each task, and of held-out perplexity and of training where they are judged."""
        budget = self.recipe.budget
        drops: dict[str, tuple[Bounds, float]] = {
            task: (partial(self._drop_interval, twin, name, [task]), (budget[task] or 0.0) / 100)
            for task in self._tasks
        }
        if text is not None and (limit := budget[PERPLEXITY]) is not None:
            drops[PERPLEXITY] = (text.interval, math.log1p(limit / 100))
        if (asked := budget.get(TRAINING)) is not None:
            drops[TRAINING] = (partial(self._drop_interval, START, name, self._tasks), asked / 100)
        return paired.judge(drops)

    def _drop_interval(self, before: str, after: str, tasks: Sequence[str], confidence: float) -> Interval:
        return difference(self._correct(before, tasks), self._correct(after, tasks), confidence).interval

    def _text_rise(self, name: str, twin: str) -> TextRise | None:
        read = [[load_texts(study.arm(arm).eval).texts[HELD_OUT] for study in self.studies] for arm in (twin, name)]
        return text_rise(*read)

    def _of_training(self, name: str, verdict: Verdict | None) -> TrainingComparison:
        start, arm = self._correct(START, self._tasks), self._correct(name, self._tasks)
        bounds = partial(self._drop_interval, START, name, self._tasks)
        drop = difference(start, arm).mean
        return compare_training(start.shape[1], drop, bounds, self.recipe.budget.get(TRAINING), verdict)

    def _of_text(self, text: TextRise, verdict: Verdict | None) -> TextOfSeeds:
        mean, *edges = (_percent_of_nats(nats) for nats in (text.of_text.mean, *text.interval()))
        return TextOfSeeds(
            rise_percent=[_percent_of_nats(nats) for nats in text.per_seed],
            rise_mean_percent=mean,
            rise_ci95_percent=edges,
            budget_percent=self.recipe.budget[PERPLEXITY],
            verdict=verdict,
        )

    def _of_tasks(
        self,
        name: str,
        twin: str | None,
        tasks: Sequence[str],
        budget_pp: float | None = None,
        verdict: Verdict | None = None,
    ) -> TaskOfSeeds:
        """Scores over the items of these tasks together; drops are null for an arm without a twin."""
        correct = self._correct(name, tasks)
        accuracy = correct.mean(axis=1)
        lost = None if twin is None else difference(self._correct(twin, tasks), correct)
        return TaskOfSeeds(
            num_items=correct.shape[1],
            accuracy=accuracy.tolist(),
            mean=float(accuracy.mean()),
            sd=paired.standard_deviation(accuracy),
            drop_pp=None if lost is None else _percents(lost.per_seed),
            drop_mean_pp=None if lost is None else 100 * lost.mean,
            drop_sd_pp=None if lost is None else _percent(lost.sd),
            drop_ci95_pp=None if lost is None else _percents(lost.interval),
            drop_ci95_items_pp=None if lost is None else _percents(lost.items),
            drop_ci95_seeds_pp=None if lost is None or lost.seeds is None else _percents(lost.seeds),
            budget_pp=budget_pp,
            verdict=verdict,
        )

    def _loss_gaps(self, first: str, second: str) -> list[LossGap]:
        """Over the steps in which either arm quantizes; over all of them where neither does, or records are missing."""
        gaps = []
        for both in zip(self.losses[first], self.losses[second], strict=True):
            quantized = {step for rows in both for step, row in rows.items() if row["phase"] == "qat"}
            steps = quantized or both[0].keys()
            gaps.append(loss_gap(*({step: rows[step]["loss"] for step in rows if step in steps} for rows in both)))
        return [gap for gap in gaps if gap is not None]

    def _findings(self, name: str) -> list[list[str]] | None:
        """What the diagnosis of each seed found; None unless all are diagnosed."""
        files = [study.diagnosis for study in self.studies]
        arms = [read_json(file, StudyDiagnosis).arms for file in files if file.is_file()]
        found = [of_seed[name].findings for of_seed in arms if name in of_seed]
        return found if len(found) == len(files) else None


def _losses(folder: ArmFolder) -> dict[int, MetricsRow]:
    return losses(folder, read_json(folder.result, ArmResult).match["steps"])


def _answer(found: Difference, first: str, second: str) -> str:
    mean = 100 * found.mean
    if found.answer == "no effect shown":
        most = 100 * max(map(abs, found.interval))
        return f"no effect shown: {first} is {mean:+.2f} pp against {second} (could be up to {most:.2f} pp)"
    than = "better" if found.answer == "helps" else "worse"
    edges = interval(_percents(found.interval))
    return f"{found.answer}: {first} is {abs(mean):.2f} pp {than} than {second} (95% interval {edges})"


def _percent_of_nats(nats: float) -> float:
    return 100 * (perplexity(nats) - 1)


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _percents(fractions: Sequence[float]) -> list[float]:
    return [100 * fraction for fraction in fractions]
