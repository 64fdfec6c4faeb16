"""What a study ends in, and the files that keep it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qatrun.evaluate.paired import worst_verdict
from qatrun.files import read_json, replace_file, write_json
from qatrun.layout import StudyFolder
from qatrun.records.comparison import ArmComparison, OverPtq, Pair, StudyComparison, TaskComparison
from qatrun.records.diagnosis import StudyDiagnosis
from qatrun.records.seeds import Seeds
from qatrun.records.training import AlarmRow
from qatrun.records.values import Verdict
from qatrun.report import comparison_text
from qatrun.report.notebook import result_html
from qatrun.report.overview import overview
from qatrun.report.seeds_table import seeds_text
from qatrun.report.tables import plain_text
from qatrun.report.total import Total, totals
from qatrun.train.metrics import read_alarms


@dataclass(frozen=True)
class StudyResult:
    """A finished study.

    Attributes:
        pairs: one comparison for each quantized arm that has a twin; none of a study over seeds, whose seeds have them.
        summary: what is in seeds.json; None of a study of one seed that asks no contrasts.
        over_ptq: every trained arm against one of its formats that was calibrated alone.
        diagnosis: what is in diagnosis.json; None where nothing was diagnosed, and of a study over seeds.
        page: report.html.
    """

    folder: Path
    pairs: tuple[Pair, ...]
    summary: Seeds | None = None
    over_ptq: Sequence[OverPtq] = ()
    diagnosis: StudyDiagnosis | None = None
    page: Path | None = None

    @property
    def ranked(self) -> tuple[Total, ...]:
        """Every quantized arm from start to what ships, the best first."""
        diagnosed = self.diagnosis.arms if self.diagnosis else {}
        return totals(self.pairs, diagnosed, alarms_raised(StudyFolder(self.folder)))

    @property
    def verdict(self) -> Verdict | None:
        """The worst of the arms: within, inconclusive or exceeds; None where no arm has a twin."""
        if self.summary is not None:
            return self.summary.verdict
        return worst_verdict(pair.comparison.verdict for pair in self.pairs)

    def _repr_html_(self) -> str:
        """In a notebook."""
        return result_html(self.ranked, self.diagnosis.sentence if self.diagnosis else "", self.page)


def alarms_raised(folder: StudyFolder) -> dict[str, list[AlarmRow]]:
    """Arm -> its alarms, those of its trunk among them."""
    return {name: read_alarms(folder.arm(name).alarms) for name in folder.begun}


def write_comparison(folder: StudyFolder, result: StudyResult) -> None:
    """comparison.json, comparison.csv with one row for each arm and task, and comparison.txt for the eye."""
    record = StudyComparison(
        study=folder.name, verdict=result.verdict, pairs=list(result.pairs), over_ptq=list(result.over_ptq)
    )
    write_json(folder.comparison, record)
    replace_file(folder.comparison.with_suffix(".csv"), comparison_csv(result.pairs).encode())
    write_over_ptq(folder, result.over_ptq)
    write_text(folder, result)


def write_text(folder: StudyFolder, result: StudyResult) -> None:
    """comparison.txt: what the terminal says at the end of the study, its diagnosis where there is one."""
    ranking = plain_text(overview(result.ranked), "") if result.pairs else ""
    diagnosis = plain_text(f"diagnosis: {result.diagnosis.sentence}", "") if result.diagnosis else ""
    contrasts = seeds_text(result.summary) if result.summary is not None else ""
    text = ranking + diagnosis + comparison_text(result.pairs, result.over_ptq) + contrasts
    replace_file(folder.comparison.with_suffix(".txt"), text.encode())


def read_result(folder: StudyFolder) -> StudyResult:
    """Of a finished study of one seed, as its files have it."""
    kept = read_json(folder.comparison, StudyComparison)
    return StudyResult(
        folder.path,
        tuple(kept.pairs),
        summary=read_json(folder.seeds, Seeds) if folder.seeds.is_file() else None,
        over_ptq=kept.over_ptq,
        diagnosis=read_json(folder.diagnosis, StudyDiagnosis) if folder.diagnosis.is_file() else None,
    )


def write_over_ptq(folder: StudyFolder, found: Sequence[OverPtq]) -> None:
    """qat_ptq.csv, a row for each; nothing where there is none."""
    rows = []
    for each in found:
        row = each.to_dict()
        for name in ("ci_accuracy_pp", "ci_perplexity_percent"):
            low, high = row.pop(name) or (None, None)
            row |= {f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    if rows:
        replace_file(folder.over_ptq, _csv_text(list(rows[0]), rows).encode())


def comparison_csv(pairs: Sequence[Pair]) -> str:
    """The comparisons of several arms in one table: a row for each arm and task, the interval in two columns; what is of the
    arm as a whole, perplexity and training, stands in each of its rows."""
    rows = [
        {"arm_name": pair.arm, "twin_name": pair.twin, **_task_row(task), **_arm_row(pair.comparison)}
        for pair in pairs
        for task in pair.comparison.tasks
    ]
    return _csv_text(list(rows[0]), rows) if rows else ""


def _task_row(task: TaskComparison) -> dict[str, Any]:
    values = [
        list(zip(("ci95_low_pp", "ci95_high_pp"), value, strict=True)) if name == "ci95_pp" else [(name, value)]
        for name, value in task.to_dict().items()
        if name != "others"
    ]
    return dict(chain.from_iterable(values))


def _arm_row(comparison: ArmComparison) -> dict[str, Any]:
    text, training = comparison.perplexity, comparison.training
    row: dict[str, Any] = dict.fromkeys(_OF_ARM)
    if text is not None:
        low, high = text.ci95_percent
        values = (text.twin, text.arm, text.rise_percent, low, high, text.budget_percent, text.verdict)
        row |= dict(zip(_OF_TEXT, values, strict=True))
    if training is not None:
        low, high = training.ci95_pp
        values_of = (training.drop_pp, low, high, training.budget_pp, training.verdict)
        row |= dict(zip(_OF_TRAINING, values_of, strict=True))
    return row


_OF_TEXT = (
    *("perplexity_twin", "perplexity_arm", "perplexity_rise_percent"),
    *("perplexity_ci95_low_percent", "perplexity_ci95_high_percent", "perplexity_budget_percent", "perplexity_verdict"),
)
_OF_TRAINING = (
    *("training_drop_pp", "training_ci95_low_pp", "training_ci95_high_pp", "training_budget_pp", "training_verdict"),
)
_OF_ARM = (*_OF_TEXT, *_OF_TRAINING)


def write_summary(folder: StudyFolder, summary: Seeds) -> None:
    """seeds.json, and the same in seeds.csv."""
    write_json(folder.seeds, summary)
    replace_file(folder.seeds.with_suffix(".csv"), summary_csv(summary).encode())


def summary_csv(summary: Seeds) -> str:
    """A row for each arm and task, for each arm over all tasks, and for each contrast; None is an empty cell. Effects are
    percentage points: of an arm, accuracy of its twin minus its own; of a contrast, of `arm` minus `against`."""
    of_seeds = [f"{what}_seed_{seed}" for what in ("accuracy", "effect_pp") for seed in summary.seeds]
    return _csv_text([*_COLUMNS, *of_seeds], [*_arm_rows(summary), *_contrast_rows(summary)])


def _csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_INTERVALS = ("ci95", "ci95_items", "ci95_seeds")
_COLUMNS = (
    *("kind", "name", "arm", "against", "task", "num_items", "accuracy_mean", "accuracy_sd"),
    *("effect", "effect_mean_pp", "effect_sd_pp"),
    *(f"{interval}_{edge}_pp" for interval in _INTERVALS for edge in ("low", "high")),
    *("budget_pp", "answer", "loss_ape_percent"),
)


def _arm_rows(summary: Seeds) -> Iterator[dict[str, Any]]:
    for name, arm in summary.arms.items():
        for task, found in {**arm.tasks, "all tasks": arm.all_tasks}.items():
            row = {
                "kind": "arm",
                "name": name,
                "arm": name,
                "against": arm.twin,
                "task": task,
                "num_items": found.num_items,
                "accuracy_mean": found.mean,
                "accuracy_sd": found.sd,
                "budget_pp": found.budget_pp,
                "answer": found.verdict,
                **_per_seed(summary, "accuracy", found.accuracy),
            }
            if found.drop_pp is not None:
                row |= {
                    "effect": "twin minus arm",
                    "effect_mean_pp": found.drop_mean_pp,
                    "effect_sd_pp": found.drop_sd_pp,
                    "loss_ape_percent": _mean(arm.loss_apes),
                    **_edges(found.drop_ci95_pp, found.drop_ci95_items_pp, found.drop_ci95_seeds_pp),
                    **_per_seed(summary, "effect_pp", found.drop_pp),
                }
            yield row


def _contrast_rows(summary: Seeds) -> Iterator[dict[str, Any]]:
    for contrast in summary.contrasts:
        yield {
            "kind": "contrast",
            "name": contrast.name,
            "arm": contrast.a,
            "against": contrast.b,
            "task": "all tasks",
            "num_items": contrast.num_items,
            "effect": "arm minus against",
            "effect_mean_pp": contrast.difference_pp,
            "effect_sd_pp": contrast.sd_pp,
            "answer": contrast.effect,
            "loss_ape_percent": _mean(contrast.loss_ape_percent),
            **_edges(contrast.ci95_pp, contrast.ci95_items_pp, contrast.ci95_seeds_pp),
            **_per_seed(summary, "effect_pp", contrast.per_seed_pp),
        }


def _per_seed(summary: Seeds, what: str, values: list[float]) -> dict[str, float]:
    return {f"{what}_seed_{seed}": value for seed, value in zip(summary.seeds, values, strict=True)}


def _edges(*intervals: list[float] | None) -> dict[str, float]:
    return {
        f"{name}_{edge}_pp": value
        for name, interval in zip(_INTERVALS, intervals, strict=True)
        if interval is not None
        for edge, value in zip(("low", "high"), interval, strict=True)
    }


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
