"""`report.html` of a study, from what lies in its folder, with the CSV of every figure in `report/`.

Files that a study does not have, an older one or one that was not diagnosed, leave out what they would have shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qatrun.errors import InputError, Problem
from qatrun.export import artifact
from qatrun.files import read_json, reading, replace_file
from qatrun.layout import EXPORT_FILE, ArmFolder, StudyFolder
from qatrun.records.comparison import StudyComparison
from qatrun.records.diagnosis import StudyDiagnosis
from qatrun.records.environment import Environment
from qatrun.records.export import Exported
from qatrun.records.quantized import Histograms
from qatrun.records.seeds import Seeds
from qatrun.records.training import Result
from qatrun.report.page import ArmContent, Document, SeedsContent, StudyContent, render, seeds_document, study_document
from qatrun.study.doneness import changed_since_scored
from qatrun.study.flips import flipped_items
from qatrun.text import flat
from qatrun.train.metrics import read_alarms, read_metrics
from qatrun.train.tensors import read_tensor_stats

T = TypeVar("T")


def write_page(folder: StudyFolder) -> Path:
    """Write a study's page and CSV files, those of an earlier page replaced; of a study with seeds the seeds' pages too.

    Returns:
        The page.
    Raises:
        InputError: no study there, or a file in it that cannot be read.
    """
    if not folder.recipe.is_file() and not folder.environment.is_file():
        raise InputError(Problem(f"no study in {folder.path}", "study"))
    if folder.seeds.is_file() and not folder.comparison.is_file():
        return write_document(folder, seeds_document(_read_seeds(folder)))
    return write_document(folder, study_document(read_study(folder)))


def read_study(folder: StudyFolder) -> StudyContent:
    """What a study's folder holds, as the page takes it."""
    recipe_text, recipe = _read_recipe(folder)
    parent = StudyFolder(folder.path.resolve().parent)
    return StudyContent(
        name=f"{parent.name}/{folder.name}" if parent.recipe.is_file() else folder.name,
        recipe=recipe_text,
        environment=_optional(folder.environment, Environment) or Environment(),
        comparison=_optional(folder.comparison, StudyComparison),
        diagnosis=_optional(folder.diagnosis, StudyDiagnosis),
        arms=tuple(_read_arm(folder.arm(name), index) for index, name in enumerate(_arm_names(folder, recipe))),
        model=_model(recipe),
        summary=_optional(folder.seeds, Seeds),
        forgetting_limit=_forgetting_limit(recipe),
        differences=_differences(recipe),
        flips=flipped_items(folder),
        changed=tuple(text for name in _arm_names(folder, recipe) for text in changed_since_scored(folder.arm(name))),
    )


def write_document(folder: StudyFolder, document: Document) -> Path:
    """Write a page and the CSV files beside it, those of an earlier page replaced; returns the page."""
    for name, text in document.csv.items():
        replace_file(folder.csv / name, text.encode())
    for stale in set(folder.csv.glob("*.csv")) - {folder.csv / name for name in document.csv}:
        stale.unlink()
    replace_file(folder.page, render(document).encode())
    return folder.page


def _read_seeds(folder: StudyFolder) -> SeedsContent:
    recipe_text, recipe = _read_recipe(folder)
    seeds = read_json(folder.seeds, Seeds)
    pages = {seed: write_page(folder.replica(seed)) for seed in seeds.seeds if folder.replica(seed).recipe.is_file()}
    return SeedsContent(
        name=folder.name,
        recipe=recipe_text,
        environment=_optional(folder.environment, Environment) or Environment(),
        seeds=seeds,
        pages={seed: page.relative_to(folder.path).as_posix() for seed, page in pages.items()},
        model=_model(recipe),
    )


def _read_arm(folder: ArmFolder, index: int) -> ArmContent:
    result = _optional(folder.result, Result)
    histograms = _optional(folder.histograms, Histograms)
    return ArmContent(
        name=folder.path.name,
        index=index,
        twin=result.twin if result else None,
        coverage=result.coverage if result else None,
        metrics=read_metrics(folder.metrics) if folder.metrics.is_file() else (),
        tensors=read_tensor_stats(folder.path),
        histograms=histograms.tensors if histograms else (),
        alarms=read_alarms(folder.alarms),
        exports=[read_json(file, Exported) for file in sorted(folder.path.glob(f"*/{EXPORT_FILE}"))],
        plan=artifact.read_plan(folder.quantized) if folder.plan.is_file() else None,
    )


def _arm_names(folder: StudyFolder, recipe: Mapping[str, Any]) -> list[str]:
    """Arms that have begun, in the order of the recipe; by name where the recipe cannot say it."""
    arms = folder.begun
    named = recipe.get("arms")
    known = [str(name) for name in (named if isinstance(named, Mapping) else ()) if str(name) in arms]
    return [*known, *sorted(arms - set(known))]


def _forgetting_limit(recipe: Mapping[str, Any]) -> float | None:
    alarms = flat(recipe).get("monitor.alarms.forgetting_nats")
    return float(alarms) if isinstance(alarms, int | float) else None


def _differences(recipe: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Key -> arm -> its value, of what arms say for themselves; nothing where there is one arm or the recipe is none."""
    arms = recipe.get("arms")
    if not isinstance(arms, Mapping) or len(arms) < 2:
        return {}
    base = flat({key: value for key, value in recipe.items() if key != "arms"})
    own = {str(name): flat(arm or {}) for name, arm in arms.items()}
    keys = dict.fromkeys(key for values in own.values() for key in values)
    return {key: {name: _value(key, own[name], base) for name in own} for key in keys}


def _value(key: str, own: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """What holds for an arm: its own, that of a section of its own that it replaced by null, or the recipe's."""
    parents = [key.rsplit(".", place)[0] for place in range(1, key.count(".") + 1)]
    if key not in own and any(own.get(parent, base) is None for parent in parents):
        return "none"
    value = own.get(key, base.get(key))
    if value is None:
        nested = key in own or not any(name.startswith(f"{key}.") for name in base)
        return "none" if nested else "as in the recipe"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _read_recipe(folder: StudyFolder) -> tuple[str, Mapping[str, Any]]:
    """The recipe's text, and what it says; that is empty where an older or later version wrote what is no YAML."""
    text = ""
    if folder.recipe.is_file():
        with reading(folder.recipe):
            text = folder.recipe.read_text(encoding="utf-8")
    try:
        parsed = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError):
        parsed = None
    return text, parsed if isinstance(parsed, Mapping) else {}


def _model(recipe: Mapping[str, Any]) -> str:
    model = recipe.get("model")
    return str(model.get("path", "")) if isinstance(model, Mapping) else ""


def _optional(file: Path, kind: type[T]) -> T | None:
    """What a JSON file holds; None where there is none."""
    return read_json(file, kind) if file.is_file() else None
