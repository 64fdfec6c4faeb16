"""What the verbs of the command line take: their common arguments and options, and how a path that is given is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qatrun import completion
from qatrun.paths import expand_path


def expanded(written: str | Path) -> str:
    """A path as it is meant, whichever option or argument it comes by; hub ids and names stay as they are."""
    try:
        return expand_path(str(written))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def argument(metavar: str, help: str, complete: Any = None) -> Any:
    """An argument that is a path, or a name in place of one.

    Args:
        complete: what the shell offers; see `completion`.
    """
    return typer.Argument(parser=expanded, metavar=metavar, help=help, autocompletion=complete)


def place(metavar: str, help: str, complete: Any = None) -> Any:
    """An option that is a path, or a name in place of one."""
    return typer.Option(parser=expanded, metavar=metavar, help=help, autocompletion=complete)


def path_option(help: str) -> Any:
    """An option that can only be a file or a folder."""
    return typer.Option(parser=lambda written: Path(expanded(written)), metavar="PATH", help=help)


def number(help: str, least: int = 1) -> Any:
    """An option that is a whole number."""
    return typer.Option(min=least, metavar="N", help=help)


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.", autocompletion=completion.recipes
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace one key of the recipe; repeatable.")
]
StudyArgument = Annotated[
    str | None, argument("STUDY", "A study's name or folder; default: the newest.", completion.studies)
]
OutputDirOption = Annotated[Path, path_option("Where studies lie.")]
ProcessesOption = Annotated[
    str | None,
    typer.Option("--processes", metavar="N", help="Processes of this machine that share the work; auto: one a GPU."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with a study that was stopped.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Throw away an earlier study of this name.")]
FailOption = Annotated[
    bool, typer.Option("--fail-on-verdict/--no-fail-on-verdict", help="Exit with 1 if a drop exceeds its budget.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict/--no-strict", help="With --fail-on-verdict: exit with 4 if inconclusive.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _trust(context: typer.Context, trust: bool) -> bool:
    if trust:
        from qatrun.evaluate.trust import trusting_task_code

        context.with_resource(trusting_task_code())
    return trust


TrustOption = Annotated[
    bool,
    typer.Option("--trust-task-code", callback=_trust, help="Run code that comes with task files (!function, Jinja)."),
]
