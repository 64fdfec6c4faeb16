"""Verbs that look at what was trained: scores, comparisons, diagnoses, exports."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from qatrun import completion, terminal
from qatrun.errors import InputError
from qatrun.options import (
    JsonOption,
    OutputDirOption,
    ProcessesOption,
    StudyArgument,
    TrustOption,
    argument,
    number,
    path_option,
    place,
)
from qatrun.serving import ENGINE_NAMES, EXPORT_NAMES, TABLE_FORMATS, known
from qatrun.verbs.console import err, exit_by_verdict, in_processes, out, print_over_ptq


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
    in_processes(processes)
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
    took, ranked, against = ranked_arms(
        twin, arm, study=study, output_dir=output_dir, budgets=budget or (), anyway=anyway
    )
    pairs = [total.pair for total in ranked]
    if format_ == "json":
        whole = {"pairs": [pair.to_dict() for pair in pairs], "over_ptq": [each.to_dict() for each in against]}
        out.print_data(pairs[0].to_dict() if twin is not None else whole)
    elif format_ == "csv":
        sys.stdout.write(comparison_csv(pairs))
    elif format_ != "text":
        sys.stdout.write(marked_up(ranked, format_))
    else:
        out.out(f"comparing {took}")
        out.print(overview(ranked))
        print_over_ptq(against)
        for total in ranked if twin is not None else ():
            out.print()
            out.print(comparison_table(total.pair, total.alarms))
    exit_by_verdict(max((total.verdict for total in ranked), key=VERDICTS.index), strict)


def diagnose(
    study: StudyArgument = None,
    output_dir: OutputDirOption = Path("runs"),
    json_: JsonOption = False,
    processes: ProcessesOption = None,
    trust_task_code: TrustOption = False,
) -> None:
    """Say what a drop is made of, each cause found, ruled out or not shown; scores three more models for each arm."""
    in_processes(processes)
    terminal.quiet_libraries()
    from qatrun.layout import StudyFolder
    from qatrun.records.training import distinct
    from qatrun.report import TerminalDisplay
    from qatrun.report.diagnosis import diagnosis_table
    from qatrun.study import alarms_raised, diagnose_study

    with TerminalDisplay(err) as display:
        found = diagnose_study(study, output_dir, display)
    if json_:
        out.print_data({folder: diagnosis.to_dict() for folder, diagnosis in found.items()})
        return
    for folder, diagnosis in found.items():
        raised = distinct(chain.from_iterable(alarms_raised(StudyFolder(Path(folder))).values()))
        for arm in diagnosis.arms.values():
            out.print(f"\n{folder}", markup=False)
            out.print(diagnosis_table(arm, len(raised)))


def report(study: StudyArgument = None, output_dir: OutputDirOption = Path("runs")) -> None:
    """Write a study's page: one HTML file that needs no network, and the CSV of every figure."""
    from qatrun.study import report_study

    out.out(f"wrote {report_study(study, output_dir)}")
