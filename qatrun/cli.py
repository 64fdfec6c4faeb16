"""The command line. Nothing heavy is imported before a verb needs it, so `--help` is instant."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qatrun import boundary, followers, ranks, terminal
from qatrun.verbs import decide, keep, score, train
from qatrun.verbs.console import err, out, say

app = typer.Typer(
    name="qatrun",
    help="Run quantization-aware-training recipes for language models and learn honestly what quantization cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
)

app.command()(train.train)
app.command()(train.ptq)
app.command()(train.check)
app.command(name="eval")(score.evaluate)
app.command()(score.export)
app.command()(score.compare)
app.command()(score.diagnose)
app.command()(train.fix)
app.command()(decide.advise)
app.command()(decide.sensitivity)
app.command()(decide.inspect)
app.command()(score.report)
app.command()(keep.studies)
app.command()(keep.clean)
app.command()(train.recipes)
app.command()(train.init)


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


def main() -> None:
    """Entry point: every error ends in a sentence and an exit code. Of several processes the first runs the command; the
    others follow it, and end with its code."""
    terminal.prepare()
    code = boundary.exit_code_of(_command, say)
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


if __name__ == "__main__":
    main()
