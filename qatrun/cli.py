"""The command line: parse, call, print. Nothing heavy is imported before a verb needs it, so `--help` is instant."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatrun import boundary, completion, followers, ranks, terminal
from qatrun.errors import InputError
from qatrun.formats import FORMATS
from qatrun.hardware import HARDWARE_NAMES
from qatrun.launch import number_of, run_in_processes
from qatrun.options import (
    JsonOption,
    OutputDirOption,
    ProcessesOption,
    RecipeArgument,
    SetOption,
    StudyArgument,
    TrustOption,
    argument,
    number,
    path_option,
    place,
)
from qatrun.serving import ENGINE_NAMES, EXPORT_NAMES, TABLE_FORMATS, known

if TYPE_CHECKING:
    from qatrun.study import StudyResult

app = typer.Typer(
    name="qatrun",
    help="Run quantization-aware-training recipes for language models and learn honestly what quantization cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
)
out, err = terminal.StreamConsole(), terminal.StreamConsole(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.out(f"qatrun {version('qatrun')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What stands before a verb."""


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a study that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away an earlier study of this name.")] = False,
    fail_on_verdict: Annotated[bool, typer.Option(help="Exit with 1 if a drop exceeds its budget.")] = False,
    strict: Annotated[bool, typer.Option(help="With --fail-on-verdict: exit with 4 if inconclusive.")] = False,
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
    boundary.working_in(Path(loaded.output_dir) / loaded.name)
    _in_processes(processes)
    terminal.quiet_libraries()
    from qatrun.report import TerminalDisplay
    from qatrun.report.fix import fix_table
    from qatrun.study import fix_study, run_study

    with _located(recipe, set_), TerminalDisplay(out) as display:
        result = run_study(loaded, display, resume=resume, overwrite=overwrite, trackers=track or ())
    _print_result(result)
    if fix:
        with TerminalDisplay(out) as display:
            out.print("\n", fix_table(fix_study(str(result.folder), result.folder.parent, display)))
    if fail_on_verdict:
        _exit_by_verdict(result.verdict, strict)


@app.command()
def ptq(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a study that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away an earlier study of this name.")] = False,
    fail_on_verdict: Annotated[bool, typer.Option(help="Exit with 1 if a drop exceeds its budget.")] = False,
    strict: Annotated[bool, typer.Option(help="With --fail-on-verdict: exit with 4 if inconclusive.")] = False,
    processes: ProcessesOption = None,
    trust_task_code: TrustOption = False,
) -> None:
    """Make a recipe's quantized arms from the start model by calibration alone, as a study of its own."""
    from qatrun.recipe import calibrated_alone, load_recipe

    loaded = calibrated_alone(load_recipe(recipe, set_ or ()))
    boundary.working_in(Path(loaded.output_dir) / loaded.name)
    _in_processes(processes)
    terminal.quiet_libraries()
    from qatrun.report import TerminalDisplay
    from qatrun.study import run_study

    with _located(recipe, set_), TerminalDisplay(out) as display:
        result = run_study(loaded, display, resume=resume, overwrite=overwrite)
    _print_result(result)
    if fail_on_verdict:
        _exit_by_verdict(result.verdict, strict)


@app.command()
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
    from qatrun.study import preflight

    checked = preflight(loaded, ranks.started().size if processes is None else number_of(processes), hardware)
    plan = checked.dry_run()
    if time and not checked.problems:
        from qatrun.study.timing import training_seconds

        plan = plan.model_copy(update={"training_seconds": training_seconds(checked)})
    if json_:
        out.print_data(plan.to_dict())
    else:
        out.print(dry_run(plan))
    if checked.problems:
        with _located(recipe, set_):
            raise InputError(checked.problems)


@app.command(name="eval")
def evaluate(
    path: Annotated[
        str,
        argument(
            "PATH", "A model: an arm of a study, a quantized folder, or any Hugging Face model.", completion.arm_folders
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Comma-separated; default: the study's, else the three benchmarks."),
    ] = None,
    limit: Annotated[int | None, number("Items per leaf task (MMLU has 57).")] = None,
    num_fewshot: Annotated[int | None, number("Few-shot examples, for every task.", least=0)] = None,
    data_dir: Annotated[str | None, place("PATH", "Folder laid out like the hub to take questions from.")] = None,
    batch_size: Annotated[int | None, number("Sequences per forward.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Engine to score an exported folder in: {', '.join(ENGINE_NAMES)}; default: the one that opens it.",
        ),
    ] = None,
    text: Annotated[
        str | None, place("PATH", "Text to read for a perplexity; default: the held-out text of the model's study.")
    ] = None,
    output: Annotated[Path | None, path_option("Folder for scores and samples, which `compare` reads.")] = None,
    json_: JsonOption = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    processes: ProcessesOption = None,
    trust_task_code: TrustOption = False,
) -> None:
    """Score any checkpoint: one of ours with its quantizers on, an exported folder in an engine, or a plain Hugging Face
    model."""
    chosen = None if engine is None else known(engine, ENGINE_NAMES, "--engine")
    _in_processes(processes)
    terminal.quiet_libraries()
    from qatrun.report import TerminalDisplay, score_table
    from qatrun.study import eval_config, score_path

    config = eval_config(
        path, tasks=tasks, limit=limit, num_fewshot=num_fewshot, data_dir=data_dir, batch_size=batch_size
    )
    with TerminalDisplay(err) as display:
        scored = score_path(
            path, config, display, output, engine=chosen, text=text, trust_remote_code=trust_remote_code
        )
    if json_:
        out.print_data(scored.to_dict())
    else:
        out.print(score_table(scored))


@app.command()
def export(
    arm: Annotated[str, argument("ARM", "A quantized arm's folder.", completion.arm_folders)],
    to: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"{', '.join(EXPORT_NAMES)}; default: what fits the arm's format."),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --to hif8: ascend, for Huawei's inference recipes.")
    ] = None,
    output: Annotated[Path | None, path_option("Folder to write; default: one named after --to in the arm's.")] = None,
    json_: JsonOption = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
) -> None:
    """Write a quantized arm as a folder that serving engines read, and prove it equal to what was scored."""
    terminal.quiet_libraries()
    from qatrun.report.exported import exported_table, holds
    from qatrun.study import export_arm

    name = None if to is None else known(to, EXPORT_NAMES, "--to")
    if layout is not None:
        name = known(f"{name}-{layout}", ("hif8-ascend",), "--to and --layout")
    folder, record = export_arm(Path(arm), name, output, trust_remote_code=trust_remote_code)
    if json_:
        out.print_data(record.to_dict())
    else:
        out.print(exported_table(folder, record))
    if not holds(record):
        raise typer.Exit(1)


@app.command()
def compare(
    twin: Annotated[
        str | None,
        argument(
            "TWIN", "The BF16 arm, or a folder with scores; none: every arm of the study, ranked.", completion.arms
        ),
    ] = None,
    arm: Annotated[str | None, argument("ARM", "The arm to judge, or a folder with scores.", completion.arms)] = None,
    study: Annotated[
        str | None, place("STUDY", "Study to take arms from; default: the newest.", completion.studies)
    ] = None,
    output_dir: OutputDirOption = Path("runs"),
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=PP", help="Acceptable drop (perplexity: percent); repeatable."),
    ] = None,
    anyway: Annotated[bool, typer.Option(help="Compare although they do not match.")] = False,
    strict: Annotated[bool, typer.Option(help="Exit with 4 if the verdict is inconclusive.")] = False,
    json_: JsonOption = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    format_: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help=f"Print {', '.join(TABLE_FORMATS)}.")
    ] = None,
) -> None:
    """Compare an arm with its BF16 twin, item by item; or every arm of a study with its own, ranked."""
    from qatrun.records.values import VERDICTS
    from qatrun.report import comparison_table
    from qatrun.report.overview import overview
    from qatrun.report.total import marked_up
    from qatrun.study import comparison_csv, ranked_arms

    asked = [name for name, given in (("json", json_), ("csv", csv), (format_, format_)) if given and name]
    if len(asked) > 1:
        raise InputError("--json, --csv and --format exclude each other")
    format_ = known(asked[0], TABLE_FORMATS, "--format") if asked else "text"
    if twin is not None and arm is None:
        raise InputError(f"compare {twin} with what? Name a second arm, or none for all arms of the study")
    took, ranked = ranked_arms(twin, arm, study=study, output_dir=output_dir, budgets=budget or (), anyway=anyway)
    pairs = [total.pair for total in ranked]
    if format_ == "json":
        out.print_data(pairs[0].to_dict() if twin is not None else {"pairs": [pair.to_dict() for pair in pairs]})
    elif format_ == "csv":
        sys.stdout.write(comparison_csv(pairs))
    elif format_ != "text":
        sys.stdout.write(marked_up(ranked, format_))
    else:
        out.out(f"comparing {took}")
        out.print(overview(ranked))
        for total in ranked if twin is not None else ():
            out.print()
            out.print(comparison_table(total.pair, total.alarms))
    _exit_by_verdict(max((total.verdict for total in ranked), key=VERDICTS.index), strict)


@app.command()
def diagnose(
    study: StudyArgument = None,
    output_dir: OutputDirOption = Path("runs"),
    json_: JsonOption = False,
    processes: ProcessesOption = None,
    trust_task_code: TrustOption = False,
) -> None:
    """Say what a drop is made of, each cause found, ruled out or not shown; scores three more models for each arm."""
    _in_processes(processes)
    terminal.quiet_libraries()
    from qatrun.layout import StudyFolder
    from qatrun.report import TerminalDisplay
    from qatrun.report.diagnosis import diagnosis_table
    from qatrun.study import alarms_raised, diagnose_study

    with TerminalDisplay(err) as display:
        found = diagnose_study(study, output_dir, display)
    if json_:
        out.print_data({folder: diagnosis.to_dict() for folder, diagnosis in found.items()})
        return
    for folder, diagnosis in found.items():
        for arm in diagnosis.arms.values():
            out.print(f"\n{folder}", markup=False)
            out.print(diagnosis_table(arm, sum(alarms_raised(StudyFolder(Path(folder))).values())))


@app.command()
def fix(
    study: StudyArgument = None,
    output_dir: OutputDirOption = Path("runs"),
    tries: Annotated[int, number("Remedies for each arm at most, until one cures it.")] = 2,
    json_: JsonOption = False,
    processes: ProcessesOption = None,
    trust_task_code: TrustOption = False,
) -> None:
    """Try the remedy that a diagnosis names, as another arm, and say whether it cured the loss (exit code 1: it did not)."""
    _in_processes(processes)
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


@app.command()
def sensitivity(
    recipe: RecipeArgument,
    set_: SetOption = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="LOSS",
            help="What may remain: nats a token (0.002), perplexity (1%) or average bits (9.5bits); default: the recipe's "
            "for perplexity.",
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Score by KL, one group at a time: some 8 times as long.")
    ] = False,
    arm: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose quantization; default: the first arm's.")
    ] = None,
    sequences: Annotated[int, number("Sequences of training text that groups are scored on.")] = 16,
    output: Annotated[Path | None, path_option("Folder to write; default: beside the studies.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away what other settings found there.")] = False,
    json_: JsonOption = False,
) -> None:
    """Say which linears quantization hurts, and write a recipe that keeps in BF16 those that a budget asks for."""
    from qatrun.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    terminal.quiet_libraries()
    from qatrun.report import TerminalDisplay
    from qatrun.report.sensitivity import sensitivity_table
    from qatrun.study import find_sensitivity

    with _located(recipe, set_), TerminalDisplay(err) as display:
        folder, found = find_sensitivity(
            loaded,
            display,
            source=recipe,
            overrides=set_ or (),
            arm=arm,
            budget=budget,
            exact=exact,
            sequences=sequences,
            output=output,
            overwrite=overwrite,
        )
    if json_:
        out.print_data(found.to_dict())
        return
    out.print(sensitivity_table(found))
    out.out(f"\nthe page: {folder / 'report.html'}")
    if found.fragment is not None:
        out.out(f"a recipe that keeps them: {folder / found.fragment}")


@app.command()
def inspect(
    model: Annotated[str, argument("MODEL", "A model folder or hub id, in full precision.")],
    data: Annotated[str, place("PATH", "Text to read: file, folder or hub id.")],
    format_: Annotated[
        str, typer.Option("--format", metavar="NAME", help="Number format to hold values against.")
    ] = "int8",
    text_column: Annotated[str | None, typer.Option(metavar="NAME", help="Its column; default: text.")] = None,
    sequences: Annotated[int, number("Sequences to read.")] = 16,
    seq_len: Annotated[int, number("Tokens of each, at most the model's context.", least=2)] = 512,
    output: Annotated[Path | None, path_option("Folder to write; default: one named after the model, here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away what other settings found there.")] = False,
    json_: JsonOption = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
) -> None:
    """Show how the values of every tensor are spread: ranges, outlier channels, what scale and zero-point would do."""
    chosen = known(format_, tuple(FORMATS), "--format")
    terminal.quiet_libraries()
    from qatrun.report import TerminalDisplay
    from qatrun.report.inspection import inspection_table
    from qatrun.study import inspect_model

    with TerminalDisplay(err) as display:
        folder, found = inspect_model(
            model,
            data,
            display,
            format_name=chosen,
            text_column=text_column,
            sequences=sequences,
            seq_len=seq_len,
            output=output,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    if json_:
        out.print_data(found.to_dict())
        return
    out.print(inspection_table(found))
    out.out(f"\nthe page: {folder / 'report.html'}")


@app.command()
def report(study: StudyArgument = None, output_dir: OutputDirOption = Path("runs")) -> None:
    """Write a study's page: one HTML file that needs no network, and the CSV of every figure."""
    from qatrun.study import report_study

    out.out(f"wrote {report_study(study, output_dir)}")


@app.command()
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


@app.command()
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


@app.command()
def recipes() -> None:
    """List the recipes that ship with qatrun."""
    from qatrun.recipe import shipped_recipes

    for recipe in shipped_recipes():
        out.out(f"{recipe.name:<20} {recipe.purpose}")


@app.command()
def init(
    model: Annotated[str, argument("MODEL", "A model folder or hub id.")],
    output: Annotated[Path | None, path_option("File to write; default: <model's name>.yaml here.")] = None,
) -> None:
    """Write a commented recipe for a model, to be edited."""
    from qatrun.recipe import template

    file = output or Path(f"{Path(model).resolve().name}.yaml")
    if file.exists():
        raise InputError(f"{file} exists already; give another --output")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(template(model), encoding="utf-8")
    out.out(f"wrote {file}; next: qatrun check {file} --time")


def main() -> None:
    """Entry point: every error ends in a sentence and an exit code. Of several processes the first runs the command; the
    others follow it, and end with its code."""
    terminal.prepare()
    code = boundary.exit_code_of(_command, _say)
    if (lost := terminal.finish()) is not None:
        err.out(f"the output could not be written: {boundary.os_error_sentence(lost)[0]}")
        code = code or 3
    followers.end(code)
    if code == 0:
        ranks.leave()
    raise SystemExit(code)


def _command() -> Any:
    with followers.losses_named():
        if ranks.start().leads:
            return app(prog_name="qatrun", standalone_mode=False)
        try:
            terminal.quiet_libraries()
            return followers.follow()
        except KeyboardInterrupt:  # the first was interrupted too, and says so
            raise SystemExit(boundary.INTERRUPTED) from None


def _say(text: str) -> None:
    own = ranks.started()
    err.out(text if own.leads else f"process {own.rank} of {own.size}: {text}")


def _in_processes(asked: str | None) -> None:
    """Go on in this process, or run the command in so many others."""
    code = run_in_processes(asked)
    if code is not None:
        raise typer.Exit(code)


def _print_result(result: StudyResult) -> None:
    """What a study ended in."""
    from qatrun.report import comparison_table
    from qatrun.report.over_ptq import over_ptq_lines
    from qatrun.report.overview import overview
    from qatrun.report.seeds_table import seeds_table

    ranked = result.ranked
    if ranked:
        out.print()
        out.print(overview(ranked))
    for line in over_ptq_lines(result.over_ptq):
        out.print(f"\n{line}", markup=False)
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


@contextmanager
def _located(recipe: str, overrides: list[str] | None) -> Iterator[None]:
    """Give problems that model and data showed the file and line of their key."""
    from qatrun.recipe import locate

    try:
        yield
    except InputError as error:
        raise InputError(locate(error.problems, recipe, overrides or ())) from error


def _exit_by_verdict(verdict: str | None, strict: bool) -> None:
    code = {"exceeds": 1, "inconclusive": 4 if strict else 0}.get(verdict or "within", 0)
    if code:
        raise typer.Exit(code)


if __name__ == "__main__":
    main()
