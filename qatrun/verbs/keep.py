"""Verbs about the folder of studies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qatrun.errors import InputError
from qatrun.options import (
    JsonOption,
    OutputDirOption,
    StudyArgument,
)
from qatrun.verbs.console import out


def studies(output_dir: OutputDirOption = Path("runs"), json_: JsonOption = False) -> None:
    """List the studies in a folder: verdict, arms, size, and what `clean` would free."""
    from qatrun.report.studies import studies_table
    from qatrun.study import list_studies

    found = list_studies(output_dir)
    if json_:
        out.print_data([vars(study) for study in found])
    elif found:
        out.print(studies_table(found))
    else:
        out.out(f"no study in {output_dir} yet")


def clean(
    study: StudyArgument = None,
    output_dir: OutputDirOption = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete the checkpoints of a finished study, after asking; weights, scores and records stay."""
    from qatrun.study import clean as clean_study
    from qatrun.study import named_study, spare_files
    from qatrun.text import readable_size

    folder = named_study(study, output_dir)
    spare = spare_files(folder)
    size = readable_size(sum(file.stat().st_size for file in spare))
    if not spare:
        out.out(f"{folder.path}: nothing to free")
        return
    out.out(
        f"{folder.path}: {len(spare)} files of checkpoints, {size}; `fix` and new arms would train their trunk again"
    )
    if not yes and not sys.stdin.isatty():
        raise InputError("nobody to ask here: give --yes")
    if yes or typer.confirm("delete them?"):
        out.out(f"freed {readable_size(clean_study(folder))}")
