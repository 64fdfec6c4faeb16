"""What a study ends in, and the files that keep it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatrun.evaluate.replication import worst_verdict
from qatrun.files import replace_file, write_json
from qatrun.report import comparison_text
from qatrun.report.seeds_table import seeds_text
from qatrun.study.layout import StudyFolder
from qatrun.study.pairs import Pair


@dataclass(frozen=True)
class StudyResult:
    """A finished study.

    Attributes:
        pairs: one comparison for each quantized arm that has a twin; none of a study over seeds, whose seeds have them.
        summary: what is in seeds.json; None of a study of one seed that asks no contrasts.
        diagnosis: what is in diagnosis.json; None where nothing was diagnosed, and of a study over seeds.
        page: report.html.
    """

    folder: Path
    pairs: tuple[Pair, ...]
    summary: Mapping[str, Any] | None = None
    diagnosis: Mapping[str, Any] | None = None
    page: Path | None = None

    @property
    def verdict(self) -> str | None:
        """The worst of the arms: within, inconclusive or exceeds; None where no arm has a twin."""
        if self.summary is not None:
            verdict: str | None = self.summary["verdict"]
            return verdict
        return worst_verdict(pair.comparison.verdict for pair in self.pairs)


def write_comparison(folder: StudyFolder, result: StudyResult) -> None:
    """comparison.json, comparison.csv with one row for each arm and task, and comparison.txt for the eye."""
    pairs = [pair.to_dict() for pair in result.pairs]
    write_json(folder.comparison, {"study": folder.name, "verdict": result.verdict, "pairs": pairs})
    replace_file(folder.comparison.with_suffix(".csv"), comparison_csv(result.pairs).encode())
    contrasts = seeds_text(result.summary) if result.summary is not None else ""
    replace_file(folder.comparison.with_suffix(".txt"), (comparison_text(pairs) + contrasts).encode())


def comparison_csv(pairs: Sequence[Pair]) -> str:
    """The comparisons of several arms in one table, with the arm and its twin in front of each row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for index, pair in enumerate(pairs):
        header, *rows = csv.reader(io.StringIO(pair.comparison.to_csv()))
        if index == 0:
            writer.writerow(["arm_name", "twin_name", *header])
        writer.writerows([pair.arm, pair.twin, *row] for row in rows)
    return text.getvalue()


def write_summary(folder: StudyFolder, summary: Mapping[str, Any]) -> None:
    """seeds.json, and the same in seeds.csv."""
    write_json(folder.seeds, summary)
    replace_file(folder.seeds.with_suffix(".csv"), summary_csv(summary).encode())


def summary_csv(summary: Mapping[str, Any]) -> str:
    """A row for each arm and task, for each arm over all tasks, and for each contrast; None is an empty cell. Effects are
    percentage points: of an arm, accuracy of its twin minus its own; of a contrast, of `arm` minus `against`."""
    text = io.StringIO()
    columns = [*_COLUMNS, *(f"{what}_seed_{seed}" for what in ("accuracy", "effect_pp") for seed in summary["seeds"])]
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*_arm_rows(summary), *_contrast_rows(summary)])
    return text.getvalue()


_INTERVALS = {"ci95": "", "ci95_items": "_items", "ci95_seeds": "_seeds"}
_COLUMNS = (
    *("kind", "name", "arm", "against", "task", "num_items", "accuracy_mean", "accuracy_sd"),
    *("effect", "effect_mean_pp", "effect_sd_pp"),
    *(f"{interval}_{edge}_pp" for interval in _INTERVALS for edge in ("low", "high")),
    *("budget_pp", "answer", "loss_ape_percent"),
)


def _arm_rows(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, arm in summary["arms"].items():
        for task, found in {**arm["tasks"], "all tasks": arm["all_tasks"]}.items():
            row = {
                "kind": "arm",
                "name": name,
                "arm": name,
                "against": arm["twin"],
                "task": task,
                "num_items": found["num_items"],
                "accuracy_mean": found["mean"],
                "accuracy_sd": found["sd"],
                "budget_pp": found["budget_pp"],
                "answer": found["verdict"],
                **_per_seed(summary, "accuracy", found["accuracy"]),
            }
            if arm["twin"] is not None:
                row |= {
                    "effect": "twin minus arm",
                    "effect_mean_pp": found["drop_mean_pp"],
                    "effect_sd_pp": found["drop_sd_pp"],
                    "loss_ape_percent": _mean((arm["loss_ape_percent"] or {}).get("after_switch")),
                    **_edges({key: found[f"drop_ci95{suffix}_pp"] for key, suffix in _INTERVALS.items()}),
                    **_per_seed(summary, "effect_pp", found["drop_pp"]),
                }
            yield row


def _contrast_rows(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for contrast in summary["contrasts"]:
        yield {
            "kind": "contrast",
            "name": contrast["name"],
            "arm": contrast["a"],
            "against": contrast["b"],
            "task": "all tasks",
            "num_items": contrast["num_items"],
            "effect": "arm minus against",
            "effect_mean_pp": contrast["difference_pp"],
            "effect_sd_pp": contrast["sd_pp"],
            "answer": contrast["effect"],
            "loss_ape_percent": _mean(contrast["loss_ape_percent"]),
            **_edges({key: contrast[f"ci95{suffix}_pp"] for key, suffix in _INTERVALS.items()}),
            **_per_seed(summary, "effect_pp", contrast["per_seed_pp"]),
        }


def _per_seed(summary: Mapping[str, Any], what: str, values: list[float]) -> dict[str, float]:
    return {f"{what}_seed_{seed}": value for seed, value in zip(summary["seeds"], values, strict=True)}


def _edges(intervals: Mapping[str, list[float] | None]) -> dict[str, float]:
    return {
        f"{name}_{edge}_pp": value
        for name, interval in intervals.items()
        if interval is not None
        for edge, value in zip(("low", "high"), interval, strict=True)
    }


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
