"""Verbs that measure before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qatrun import completion, terminal
from qatrun.errors import InputError
from qatrun.formats import FORMATS, nearest
from qatrun.hardware import HARDWARE_NAMES
from qatrun.options import (
    JsonOption,
    RecipeArgument,
    SetOption,
    argument,
    number,
    path_option,
    place,
)
from qatrun.serving import known
from qatrun.verbs.console import err, located, print_found


def advise(
    model_or_recipe: Annotated[
        str,
        argument("MODEL_OR_RECIPE", "A model folder or hub id, with --data; or a recipe.", completion.recipes),
    ],
    set_: SetOption = None,
    data: Annotated[str | None, place("PATH", "For a model: text to calibrate and measure on.")] = None,
    hardware: Annotated[
        str | None, typer.Option(metavar="CHIP", help="What it is to be served on; default: the recipe's target.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="LOSS",
            help="What may be lost: nats a token (0.01) or perplexity (1%); default: the recipe's for perplexity.",
        ),
    ] = None,
    output: Annotated[Path | None, path_option("Folder to write; default: beside the studies.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away what other settings found there.")] = False,
    json_: JsonOption = False,
) -> None:
    """Measure what each format costs by calibration alone, say whether training is worth it, and write the recipe."""
    chosen = None if hardware is None else known(hardware, HARDWARE_NAMES, "--hardware")
    terminal.quiet_libraries()
    from qatrun.report import TerminalDisplay
    from qatrun.report.advice import advice_table
    from qatrun.study import advise as give_advice
    from qatrun.study import recipe_to_advise

    loaded, source = recipe_to_advise(model_or_recipe, data, set_ or ())
    with TerminalDisplay(err) as display:
        folder, found = give_advice(
            loaded,
            display,
            source=source,
            hardware=chosen,
            budget=budget,
            output=output,
            overwrite=overwrite,
        )
    print_found(found, advice_table, folder, as_json=json_, recipe=found.recipe)


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

    with located(recipe, set_), TerminalDisplay(err) as display:
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
    print_found(found, sensitivity_table, folder, as_json=json_, recipe=found.fragment)


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
    if format_ not in FORMATS:
        raise InputError(f"--format: unknown format '{format_}'{nearest(format_)}")
    terminal.quiet_libraries()
    from qatrun.report import TerminalDisplay
    from qatrun.report.inspection import inspection_table
    from qatrun.study import inspect_model

    with TerminalDisplay(err) as display:
        folder, found = inspect_model(
            model,
            data,
            display,
            format_name=format_,
            text_column=text_column,
            sequences=sequences,
            seq_len=seq_len,
            output=output,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    print_found(found, inspection_table, folder, as_json=json_)
