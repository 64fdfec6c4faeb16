"""What verbs have in common: where they print, how they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qatrun import ranks, terminal
from qatrun.errors import InputError
from qatrun.launch import run_in_processes
from qatrun.layout import PAGE_FILE

if TYPE_CHECKING:
    from qatrun.files import Record
    from qatrun.records.comparison import OverPtq
    from qatrun.study import StudyResult

out, err = terminal.StreamConsole(), terminal.StreamConsole(stderr=True)


def say(text: str) -> None:
    own = ranks.started()
    err.out(text if own.leads else f"process {own.rank} of {own.size}: {text}")


def in_processes(asked: str | None) -> None:
    """Go on in this process, or run the command in so many others."""
    code = run_in_processes(asked)
    if code is not None:
        raise typer.Exit(code)


def print_over_ptq(found: Sequence[OverPtq]) -> None:
    """Whether training beat calibration alone, where a study asks it."""
    from qatrun.report.over_ptq import over_ptq_lines

    for line in over_ptq_lines(found):
        out.print(f"\n{line}", markup=False)


def print_result(result: StudyResult) -> None:
    """What a study ended in."""
    from qatrun.report import comparison_table
    from qatrun.report.overview import overview
    from qatrun.report.seeds_table import seeds_table

    ranked = result.ranked
    if ranked:
        out.print()
        out.print(overview(ranked))
    print_over_ptq(result.over_ptq)
    if result.diagnosis is not None:
        for arm in result.diagnosis.arms.values():
            out.print(f"\ndiagnosis: {arm.sentence}", markup=False)
    for total in ranked:
        out.print()
        out.print(comparison_table(total.pair, total.alarms))
    if result.summary is not None:
        out.print()
        out.print(seeds_table(result.summary))
    out.out(f"\nthe page: {result.page}\nall of it: {result.folder}")
    if not result.pairs and result.summary is None:
        out.out("no arm has a BF16 twin, so there is nothing to compare; each arm's scores are in its eval/ folder")


def print_found(
    found: Record, table: Callable[[Any], Any], folder: Path, *, as_json: bool, **files: str | None
) -> None:
    """What a verb measured, and where its page and these files of the folder lie."""
    if as_json:
        out.print_data(found.to_dict())
        return
    out.print(table(found))
    out.out(f"\nthe page: {folder / PAGE_FILE}")
    for what, file in files.items():
        if file is not None:
            out.out(f"the {what}: {folder / file}")


@contextmanager
def located(recipe: str, overrides: list[str] | None) -> Iterator[None]:
    """Give problems that model and data showed the file and line of their key."""
    from qatrun.recipe import locate

    try:
        yield
    except InputError as error:
        raise InputError(locate(error.problems, recipe, overrides or ())) from error


def exit_by_verdict(verdict: str | None, strict: bool) -> None:
    code = {"exceeds": 1, "inconclusive": 4 if strict else 0}.get(verdict or "within", 0)
    if code:
        raise typer.Exit(code)
