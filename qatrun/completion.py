"""What the shell offers behind a verb: recipes, studies, arms. Nothing heavy is imported: it runs at every press of Tab."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

from qatrun.layout import StudyFolder, newest_study


def recipes(incomplete: str) -> list[str]:
    """Shipped names, and YAML files here."""
    from qatrun.recipe.shipped import shipped_recipes  # `--help` has no use for it

    found = [recipe.name for recipe in shipped_recipes()] + [file.name for file in Path.cwd().glob("*.yaml")]
    return _beginning(found, incomplete)


def studies(context: typer.Context, incomplete: str) -> list[str]:
    """Those in the folder that --output-dir names, `runs` by default."""
    return _beginning((file.parent.name for file in _folder(context).glob("*/recipe.yaml")), incomplete)


def arms(context: typer.Context, incomplete: str) -> list[str]:
    """Of the study that --study names, or the newest; where none is, folders of arms."""
    named = context.params.get("study")
    study = StudyFolder(_folder(context) / named) if named else newest_study(_folder(context))
    return _beginning(study.begun if study else (), incomplete)


def arm_folders(incomplete: str) -> list[str]:
    """runs/study/arm"""
    return _beginning(_arm_folders(), incomplete)


def _arm_folders() -> Iterator[str]:
    for file in Path("runs").glob("*/recipe.yaml"):
        study = StudyFolder(file.parent)
        yield from (study.arm(name).path.as_posix() for name in study.begun)


def _folder(context: typer.Context) -> Path:
    return Path(context.params.get("output_dir") or "runs")


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})
