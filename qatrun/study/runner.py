"""A recipe to its result: one study, or one for each of its seeds and what they say together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from qatrun.errors import InputError, WriteError
from qatrun.files import replace_file
from qatrun.followers import end, follow
from qatrun.layout import StudyFolder
from qatrun.ranks import start, started
from qatrun.recipe import Recipe, load_recipe
from qatrun.report import TerminalDisplay
from qatrun.report.notebook import in_a_cell
from qatrun.report.seeds_table import seeds_text
from qatrun.study.checking import Preflight, preflight, tracker_problems
from qatrun.study.claim import claimed
from qatrun.study.display import Display
from qatrun.study.evidence import summarize
from qatrun.study.page import write_page
from qatrun.study.replicas import replica_preflight, replica_recipe, share_start
from qatrun.study.results import StudyResult, write_over_ptq, write_summary
from qatrun.study.single import run_single


def run(
    recipe: str | Path | Recipe, overrides: Sequence[str] = (), *, resume: bool = False, overwrite: bool = False
) -> StudyResult:
    """Run a recipe (a file, a shipped name, or one made in Python) with the live view of `qatrun train`, in a notebook with
    one line that changes; what comes out is returned and written, not printed.
    Where torchrun started several processes, all of them are to call this.

    Raises:
        as `load_recipe` and `run_study`.
    """
    if not start().leads:
        result: StudyResult = follow()
        return result
    done = None
    try:
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
        console = Console()
        with in_a_cell() if console.is_jupyter else TerminalDisplay(console) as display:
            done = run_study(loaded, display, resume=resume, overwrite=overwrite)
    finally:
        end(done)
    return done


def run_study(
    recipe: Recipe, display: Display, *, resume: bool = False, overwrite: bool = False, trackers: Sequence[str] = ()
) -> StudyResult:
    """Run a recipe from start to comparison, once for each of its seeds.

    Args:
        resume: go on with a study of the same recipe, or of one with more arms or seeds; what is finished is only compared
            again.
        overwrite: throw away the study that the folder holds.
    Raises:
        InputError: the recipe cannot run, or its folder holds something that neither option covers.
        RunError: training could not go on, or a file could not be written.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    folder = StudyFolder(Path(recipe.output_dir) / recipe.name)
    display.begin_reading("model, text and benchmarks")
    checked = preflight(recipe, started().size)
    if problems := [*checked.problems, *tracker_problems(trackers)]:
        raise InputError(problems)
    for warning in checked.warnings:
        display.on_warning(str(warning))
    with (
        claimed(folder, recipe, resume=resume, overwrite=overwrite, warn=display.on_warning),
        _saying_how_to_go_on(folder),
    ):
        result = _run_all(checked, folder, display, trackers)
        return replace(result, page=write_page(folder))


def _run_all(checked: Preflight, folder: StudyFolder, display: Display, trackers: Sequence[str]) -> StudyResult:
    recipe, seeds = checked.recipe, checked.recipe.train.seeds
    if seeds is None:
        return run_single(checked, folder, display, trackers)
    for seed in seeds:
        display.note(f"seed {seed} of {', '.join(map(str, seeds))}")
        replica, its = folder.replica(seed), replica_preflight(checked, seed)
        with claimed(replica, its.recipe, resume=True, overwrite=False, warn=display.on_warning):
            for other in folder.replicas:
                share_start(other, replica)
            run_single(its, replica, display, trackers)
    studies = {seed: folder.replica(seed) for seed in seeds}
    summary = summarize(folder.name, replica_recipe(recipe, seeds[0]), studies)
    replace_file(folder.comparison.with_suffix(".txt"), seeds_text(summary).encode())
    write_summary(folder, summary)
    write_over_ptq(folder, summary.over_ptq)
    return StudyResult(folder.path, (), summary)


@contextmanager
def _saying_how_to_go_on(folder: StudyFolder) -> Iterator[None]:
    """On a full disk a user wants to know what is lost."""
    try:
        yield
    except (WriteError, OSError) as error:
        saved = f"what was finished in {folder.path} is saved: --resume goes on from there once it can be written"
        raise WriteError(f"{error}; {saved}") from error
