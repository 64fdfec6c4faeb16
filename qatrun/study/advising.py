"""`qatrun advise`: what a model loses in each format and granularity by calibration alone, whether that is enough for a
budget, and a recipe of what to do.

training text -> calibrated scales -> held-out text: the plain model, each candidate -> the rule -> where the budget is
exceeded: which linears carry the loss, and the best candidate without those -> the recipe
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qatrun.errors import InputError
from qatrun.files import replace_file, write_json
from qatrun.layout import StudyFolder
from qatrun.model import architecture, text_config
from qatrun.recipe import Recipe, load_recipe, parse_recipe, shipped_recipes
from qatrun.recipe.document import as_yaml
from qatrun.recipe.shipped import TEMPLATE
from qatrun.records.advice import Advice
from qatrun.records.sensitivity import Sensitivity
from qatrun.report.page.advice_page import advice_document
from qatrun.study import keeping
from qatrun.study.advised_recipe import KINDS, Kind
from qatrun.study.candidates import MEASURED, Candidates
from qatrun.study.checking import preflight
from qatrun.study.deciding import answer_in_words, decide, in_order, tokens_needed, worth_keeping
from qatrun.study.display import ScoringDisplay
from qatrun.study.dryrun import dry_run_of
from qatrun.study.inputs import describe_inputs
from qatrun.study.measuring import budget_of, preflight_to_measure
from qatrun.study.output import claimed_output
from qatrun.study.page import write_document
from qatrun.study.sensitivity import find_sensitivity
from qatrun.text import suggestion

RESULT, RECIPE = "advice.json", "advised.yaml"
OWN = (RESULT, MEASURED, RECIPE)


def recipe_to_advise(model_or_recipe: str, data: str | None, overrides: Sequence[str]) -> tuple[Recipe, str]:
    """(recipe, where it is from): the one of that name, or the template's for a model and a text.

    Raises:
        InputError: a model without a text, a recipe with one, or either is wrong.
    """
    names = [recipe.name for recipe in shipped_recipes()]
    is_recipe = model_or_recipe.endswith((".yaml", ".yml")) or model_or_recipe in names
    if is_recipe and not Path(model_or_recipe).is_dir():
        if data is not None:
            raise InputError("--data: a recipe names its text; another: --set data.train.path=PATH")
        return load_recipe(model_or_recipe, overrides), model_or_recipe
    if data is None:
        near = "" if Path(model_or_recipe).exists() else suggestion(model_or_recipe, names, "")
        raise InputError(f"{model_or_recipe} is no recipe{near}; a model needs a text to be measured on: --data PATH")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model_or_recipe).resolve().name).strip("._-") or "model"
    own = {"name": name, "model.path": model_or_recipe, "data.train.path": data, "budget": {}}  # of any tasks
    settings = [f"{key}={json.dumps(value)}" for key, value in own.items()]
    recipe = load_recipe(TEMPLATE, [*settings, *overrides])
    context = getattr(text_config(architecture(recipe.model)), "max_position_embeddings", None)
    if context is not None and 0 < context < recipe.data.seq_len:
        recipe = load_recipe(TEMPLATE, [*settings, f"data.seq_len={context}", *overrides])
    return recipe, model_or_recipe


def advise(
    recipe: Recipe,
    display: ScoringDisplay,
    *,
    source: str,
    hardware: str | None = None,
    budget: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> tuple[Path, Advice]:
    """Measure every candidate, decide, and write a recipe.

    Args:
        source: what the recipe is from, in words.
        hardware: chip to serve on; None: the recipe's target.
        budget: nats a token or a rise of perplexity (see `keeping.parse_budget`); None: the recipe's for perplexity.
        output: folder; None: one beside the studies.
    Returns:
        (folder, what was found; also written there).
    Raises:
        InputError: the recipe cannot run, a budget in bits, held-out text of one sequence, hardware that runs no candidate,
            or a folder that is not free.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    limit = budget_of(recipe, budget)
    if limit.unit == "bits":
        raise InputError(f"--budget {budget}: of a loss: nats a token (0.01) or a rise of perplexity (1%)")
    checked = preflight_to_measure(recipe)
    arm = next((arm for arm in recipe.arm_by_name.values() if arm.qat is not None), None)
    arm = arm or next(iter(recipe.arm_by_name.values()))
    folder = output or Path(recipe.output_dir) / f"{recipe.name}-advice"
    settings = {
        "model": arm.model.model_dump(mode="json"),
        "data": arm.data.model_dump(mode="json"),
        "qat": None if arm.qat is None else arm.qat.model_dump(mode="json"),
        "seed": arm.train.seed,
        "inputs": describe_inputs(recipe),
    }
    with claimed_output(folder, settings, OWN, overwrite=overwrite):
        asked = keeping.in_nats(limit), hardware or recipe.target.hardware
        candidates = Candidates(recipe, arm, checked.num_parameters, folder, display, *asked)
        found = _found(candidates, source, overwrite=overwrite)
        write_document(StudyFolder(folder), advice_document(folder.name, found))
        write_json(folder / RESULT, found)
    return folder, found


def _found(candidates: Candidates, source: str, *, overwrite: bool) -> Advice:
    """Everything that is measured and decided; the recipe is written."""
    kinds = {kind.name: kind for kind in KINDS}
    found = candidates.measured(KINDS)
    if not any(each.is_advisable for each in found):
        raise InputError(f"--hardware {candidates.hardware}: it runs none of the candidates natively")
    best, way = decide(found)
    searched: tuple[str, str] | None = None
    if way == "qat":
        folder, of_linears = _sensitivity(candidates, kinds[best.name], overwrite=overwrite)
        kept, said = worth_keeping(of_linears)
        searched = said, str(folder)
        if kept:
            kind = replace(kinds[best.name], name=f"{best.name}-kept", kept=kept)
            kinds[kind.name] = kind
            found += candidates.measured([kind])
            best, way = decide(found)
    tree = candidates.tree(kinds[best.name], trains=way in ("qat", "not known"))
    num_tokens = sum(map(sum, candidates.plain.num_targets))
    advice = Advice(
        source=source,
        model=candidates.arm.model.path,
        hardware=candidates.hardware,
        budget=candidates.budget,
        plain_nats=candidates.plain.mean,
        num_tokens=num_tokens,
        num_sequences=len(candidates.plain.nats),
        bf16_bytes=2 * candidates.num_parameters,
        memory_bytes={arm.name: arm.memory_bytes or {} for arm in dry_run_of(preflight(parse_recipe(tree))).arms},
        candidates=in_order(found),
        advised=best.name,
        way=way,
        tokens_needed=tokens_needed(best, candidates.budget, num_tokens) if way == "not known" else None,
        sensitivity=searched and searched[0],
        curve=searched and searched[1],
        answer="",
        recipe=RECIPE,
    )
    advice = advice.model_copy(update={"answer": answer_in_words(advice)})
    said = "".join(f"# {line}\n" for line in ("by qatrun advise", *advice.answer.split("; ")))
    replace_file(candidates.folder / RECIPE, (said + as_yaml(tree)).encode())
    return advice


def _sensitivity(candidates: Candidates, kind: Kind, *, overwrite: bool) -> tuple[Path, Sensitivity]:
    """Of the candidate's linears, on half of the budget, which leaves the interval room."""
    tree, recipe = candidates.tree(kind, trains=True), candidates.folder / RECIPE
    replace_file(recipe, f"# not finished: qatrun advise goes on where it was stopped\n{as_yaml(tree)}".encode())
    return find_sensitivity(
        parse_recipe(tree),
        candidates.display,
        source=str(recipe),
        arm=kind.format,
        budget=f"{100 * math.expm1(candidates.budget / 2)!r}%",
        output=candidates.folder.with_name(f"{candidates.folder.name}-{kind.name}"),
        overwrite=overwrite,
    )
