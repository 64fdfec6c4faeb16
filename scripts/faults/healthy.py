"""False alarms: healthy arms, trained over many seeds and not scored to speak of."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from scipy.stats import beta

from faults.models import Subject
from faults.studies import FORMATS, STUDIES, recipe_of
from qatrun.layout import StudyFolder
from qatrun.recipe import parse_recipe
from qatrun.study import run_study
from qatrun.study.display import Display
from qatrun.study.records import first_alarms

FOLDER = "healthy"
SETTINGS = {"limit": 1}


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


def at_most(count: int, total: int) -> str:
    """The upper end of the exact 95 % interval (Clopper-Pearson) of a share, in per cent."""
    return f"{100 * float(beta.ppf(0.975, count + 1, total - count)):.0f} %" if count < total else "100 %"


def report(output: Path, console: Console) -> None:
    """Print how many healthy arms raised an alarm, and the most that the share may be."""
    table = Table("model", "text", "healthy arms", "alarmed", "at most", "alarms")
    for folder in sorted(output.glob(f"*/{FOLDER}")):
        for kind in ("own", "new"):
            arms = [
                first_alarms(StudyFolder(place).arm(name))
                for place in sorted(folder.glob(f"seed-*/{kind}"))
                for name in _healthy()[1:]
                if StudyFolder(place).arm(name).result.is_file()
            ]
            if arms:
                raised = [alarms for alarms in arms if alarms]
                kinds = ", ".join(f"{name}@{step}" for alarms in raised for name, step in alarms.items())
                row = (
                    folder.parent.name,
                    kind,
                    str(len(arms)),
                    str(len(raised)),
                    at_most(len(raised), len(arms)),
                    kinds,
                )
                table.add_row(*row)
    if table.row_count:
        console.print(table)
