"""Verbs that run recipes, or write and check them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatrun import boundary, completion, ranks, terminal
from qatrun.errors import InputError
from qatrun.hardware import HARDWARE_NAMES
from qatrun.launch import number_of
from qatrun.options import (
    FailOption,
    JsonOption,
    OutputDirOption,
    OverwriteOption,
    ProcessesOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    StrictOption,
    StudyArgument,
    TrustOption,
    argument,
    number,
    path_option,
)
from qatrun.serving import known
from qatrun.verbs.console import err, exit_by_verdict, in_processes, located, out, print_result

if TYPE_CHECKING:
    from qatrun.recipe import Recipe
    from qatrun.study import StudyResult


def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    fail_on_verdict: FailOption = False,
    strict: StrictOption = False,
    track: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Tracker of Accelerate's, such as tensorboard.")
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Try the remedy where the diagnosis finds a cause.")] = False,
    processes: ProcessesOption = None,
    trust_task_code: TrustOption = False,
) -> None:
    """Train every arm of a recipe, score them and compare them."""
    from qatrun.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    with located(recipe, set_):
        result = _run(loaded, processes, resume=resume, overwrite=overwrite, trackers=track or ())
    print_result(result)
    if fix:
        from qatrun.report import TerminalDisplay
        from qatrun.report.fix import fix_table
        from qatrun.study import fix_study

        with TerminalDisplay(out) as display:
            out.print("\n", fix_table(fix_study(str(result.folder), result.folder.parent, display)))
    if fail_on_verdict:
        exit_by_verdict(result.verdict, strict)


def ptq(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    fail_on_verdict: FailOption = False,
    strict: StrictOption = False,
    processes: ProcessesOption = None,
    trust_task_code: TrustOption = False,
) -> None:
    """Make a recipe's quantized arms from the start model by calibration alone, as a study of its own."""
    from qatrun.recipe import calibrated_alone, load_recipe

    loaded = calibrated_alone(load_recipe(recipe, set_ or ()))
    with located(recipe, set_):
        result = _run(loaded, processes, resume=resume, overwrite=overwrite)
    print_result(result)
    if fail_on_verdict:
        exit_by_verdict(result.verdict, strict)


def _run(recipe: Recipe, processes: str | None, **options: Any) -> StudyResult:
    """`run_study` with its live view."""
    boundary.working_in(Path(recipe.output_dir) / recipe.name)
    in_processes(processes)
    terminal.quiet_libraries()
    from qatrun.report import TerminalDisplay
    from qatrun.study import run_study

    with TerminalDisplay(out) as display:
        return run_study(recipe, display, **options)


def check(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A YAML file or a shipped name.", autocompletion=completion.recipes),
    ] = None,
    set_: SetOption = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
    json_: JsonOption = False,
    processes: Annotated[str | None, typer.Option(metavar="N", help="What it would be with so many.")] = None,
    hardware: Annotated[
        str | None,
        typer.Option(metavar="CHIP", help="What it is to be served on: what runs there natively, and what not."),
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Time two steps of each arm, on weights that are made up.")
    ] = False,
    trust_task_code: TrustOption = False,
) -> None:
    """Show what a recipe would do, without loading weights or writing anything."""
    from qatrun.recipe import json_schema, load_recipe

    if schema:
        out.print_data(json_schema())
        return
    if recipe is None:
        raise InputError("name a recipe to check, or give --schema")
    if hardware is not None:
        known(hardware, HARDWARE_NAMES, "--hardware")
    loaded = load_recipe(recipe, set_ or ())
    terminal.quiet_libraries()
    from qatrun.report import dry_run
    from qatrun.study import dry_run_of, preflight

    checked = preflight(loaded, ranks.started().size if processes is None else number_of(processes), hardware)
    plan = dry_run_of(checked)
    if time and checked.can_train:
        from qatrun.study.timing import training_seconds

        plan = plan.model_copy(update={"training_seconds": training_seconds(checked)})
    if json_:
        out.print_data(plan.to_dict())
    else:
        out.print(dry_run(plan))
    if checked.problems:
        with located(recipe, set_):
            raise InputError(checked.problems)


def fix(
    study: StudyArgument = None,
    output_dir: OutputDirOption = Path("runs"),
    tries: Annotated[int, number("Remedies for each arm at most, until one cures it.")] = 2,
    json_: JsonOption = False,
    processes: ProcessesOption = None,
    trust_task_code: TrustOption = False,
) -> None:
    """Try the remedy that a diagnosis names, as another arm, and say whether it cured the loss (exit code 1: it did not)."""
    in_processes(processes)
    terminal.quiet_libraries()
    from qatrun.report import TerminalDisplay
    from qatrun.report.fix import fix_table
    from qatrun.study import fix_study, named_study

    boundary.working_in(named_study(study, output_dir).path, "qatrun fix")
    with TerminalDisplay(err) as display:
        fixes = fix_study(study, output_dir, display, tries=tries)
    if json_:
        out.print_data(fixes.to_dict())
    else:
        out.print(fix_table(fixes))
    if {one.of for one in fixes.arms} - {one.of for one in fixes.arms if one.cured}:
        raise typer.Exit(1)


def recipes() -> None:
    """List the recipes that ship with qatrun."""
    from qatrun.recipe import shipped_recipes

    shipped = shipped_recipes()
    width = max(len(recipe.name) for recipe in shipped)
    for recipe in shipped:
        out.out(f"{recipe.name:<{width}} {recipe.purpose}")


def init(
    model: Annotated[str, argument("MODEL", "A model folder or hub id.")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Text to train on: a file, a folder or a hub id.")
    ] = None,
    output: Annotated[Path | None, path_option("File to write; default: <model's name>.yaml here.")] = None,
    time: Annotated[bool, typer.Option("--time", help="Check it at once, and time two steps of each arm.")] = False,
) -> None:
    """Write a commented recipe for a model, to be edited."""
    from qatrun.recipe import template

    file = output or Path(f"{Path(model).resolve().name}.yaml")
    if file.exists():
        raise InputError(f"{file} exists already; give another --output")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(template(model, data), encoding="utf-8")
    if time:
        out.out(f"wrote {file}\n")
        check(str(file), time=True)
    else:
        first = "" if data is not None else "name your text at data.train.path, then "
        out.out(f"wrote {file}; next: {first}qatrun check {file} --time")
