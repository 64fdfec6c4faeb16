"""False alarms: healthy arms, trained over many seeds and not scored to speak of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from faults.models import Subject
from faults.studies import FORMATS, STUDIES, recipe_of
from qatrun.layout import StudyFolder
from qatrun.recipe import parse_recipe
from qatrun.study import run_study
from qatrun.study.display import Display
from qatrun.study.records import first_alarms

FOLDER = "healthy"
SETTINGS = {"limit": 1}
COLUMNS = ("model", "seed", "text", "format", "alarms")


def run(subject: Subject, num_seeds: int, output: Path, display: Display) -> None:
    """Train the arms without a fault, on each kind of text, seed by seed."""
    for study in STUDIES:
        if study.name not in ("own", "new"):
            continue
        for seed in range(100, 100 + num_seeds):
            whole = recipe_of(study, subject, seed, output, {1}).model_dump(mode="json")
            whole["arms"] = {name: arm for name, arm in whole["arms"].items() if name in _healthy()}
            whole["eval"] |= SETTINGS
            whole["output_dir"] = str(output / FOLDER / f"seed-{seed}")
            run_study(parse_recipe(whole), display, resume=True)


def _healthy() -> list[str]:
    return ["bf16", *(f"{format}-none" for format in FORMATS)]


def rows(output: Path) -> Iterator[tuple[str, ...]]:
    """Of the columns COLUMNS, for each arm that was trained there."""
    for folder in sorted(output.glob(f"*/{FOLDER}/seed-*/*")):
        for name in _healthy()[1:]:
            arm = StudyFolder(folder).arm(name)
            if arm.result.is_file():
                raised = " ".join(f"{kind}@{step}" for kind, step in first_alarms(arm).items())
                model, seed = folder.parents[2].name, folder.parent.name.removeprefix("seed-")
                yield model, seed, folder.name, name.partition("-")[0], raised
