"""`qatrun advise`: what a model loses in each format and granularity by calibration alone, whether that is enough for a
budget, and a recipe of what to do.

training text -> calibrated scales -> held-out text: the plain model, each candidate -> the rule -> where the budget is
exceeded: which linears to keep -> the recipe
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from qatrun.data import open_data
from qatrun.errors import InputError, Problem
from qatrun.evaluate.attribution import rise
from qatrun.evaluate.text import score_texts
from qatrun.files import read_rows, replace_file, write_json
from qatrun.hardware import answer
from qatrun.layout import START, ArmFolder, StudyFolder
from qatrun.model import DTYPES, architecture, load_model, on_device, text_config
from qatrun.numerics import bfloat16_products
from qatrun.quant import QuantPlan, calibrated_plan, coverage, make_plan, survey
from qatrun.recipe import Arm, Recipe, load_recipe, parse_recipe, shipped_recipes
from qatrun.recipe.document import as_yaml
from qatrun.recipe.shipped import TEMPLATE
from qatrun.records.advice import Advice, Candidate, ScoredRow
from qatrun.records.scores import TextScore
from qatrun.records.sensitivity import Sensitivity
from qatrun.report.page.advice_page import advice_document
from qatrun.study import keeping
from qatrun.study.advised_recipe import KINDS, Kind, advised_tree
from qatrun.study.deciding import answer_in_words, decide, in_order, tokens_needed, verdict_of
from qatrun.study.display import ScoringDisplay
from qatrun.study.dryrun import dry_run_of
from qatrun.study.inputs import describe_inputs
from qatrun.study.output import claimed_output
from qatrun.study.page import write_document
from qatrun.study.preflight import Preflight, preflight
from qatrun.study.sensitivity import LOGITS_AT_ONCE, find_sensitivity
from qatrun.study.variants import calibrated
from qatrun.text import suggestion
from qatrun.tokenizer import load_tokenizer
from qatrun.train.metrics import RowsFile

RESULT, MEASURED, RECIPE = "advice.json", "measured.jsonl", "advised.yaml"
OWN = (RESULT, MEASURED, RECIPE)
PLAIN, HELD_OUT = "plain", "held-out"


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
    limit = keeping.parse_budget(budget or f"{recipe.budget['perplexity'] or 1.0}%")
    if limit.unit == "bits":
        raise InputError(f"--budget {budget}: of a loss: nats a token (0.01) or a rise of perplexity (1%)")
    nats = limit.value if limit.unit == "nats" else math.log1p(limit.value / 100)
    checked = preflight(recipe)
    asked_elsewhere = {"eval", "export"}  # of what is not done here
    if problems := [each for each in checked.problems if not asked_elsewhere & set(each.key.split("."))]:
        raise InputError(problems)
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
        search = _Search(recipe, arm, checked, folder, display, nats, hardware or recipe.target.hardware)
        try:
            found = search.result(source, overwrite=overwrite)
        except KeyboardInterrupt:
            display.on_warning("stopped by Ctrl-C: what is measured is saved, and the same command goes on from there")
            raise
        write_document(StudyFolder(folder), advice_document(folder.name, found))
        write_json(folder / RESULT, found)
    return folder, found


class _Search:
    """One model with its text."""

    def __init__(
        self,
        recipe: Recipe,
        arm: Arm,
        checked: Preflight,
        folder: Path,
        display: ScoringDisplay,
        budget: float,
        hardware: str | None,
    ) -> None:
        self.recipe, self.arm, self.folder, self.display = recipe, arm, folder, display
        self.budget, self.hardware, self.num_parameters = budget, hardware, checked.num_parameters
        self.data = open_data(arm.data, load_tokenizer(arm.model), arm.train.seed)
        if len(self.data.valid.input_ids) < 2:
            raise InputError(Problem("an interval needs two sequences or more", "data.valid_sequences"))
        self.empty = architecture(arm.model)
        self.seen = survey(self.empty)
        room = LOGITS_AT_ONCE // (arm.data.seq_len * text_config(self.empty).vocab_size)
        self.at_once = max(1, min(arm.train.micro_batch_size, room))

    def result(self, source: str, *, overwrite: bool) -> Advice:
        made = {kind.name: self._made(kind) for kind in KINDS}
        scores = self._scores({name: of for name, of in made.items() if not isinstance(of, str)})
        candidates = [self._candidate(kind, made[kind.name], scores) for kind in KINDS]
        if not (advisable := [each for each in candidates if each.is_advisable]):
            raise InputError(f"--hardware {self.hardware}: it runs none of the candidates natively")
        best, way = decide(advisable)
        kept: list[str] = []
        sensitivity = None
        if way == "qat":
            sensitivity = self._sensitivity(best, overwrite=overwrite)
            kept = _worth_keeping(sensitivity, self.budget)
            way = "ptq with some kept" if kept else way
        tree = self._tree(best.name, trains=way in ("qat", "not known"), kept=kept)
        plain = scores[PLAIN]
        num_tokens = sum(map(sum, plain.num_targets))
        found = Advice(
            source=source,
            model=self.arm.model.path,
            hardware=self.hardware,
            budget=self.budget,
            plain_nats=plain.mean,
            num_tokens=num_tokens,
            num_sequences=len(plain.nats),
            bf16_bytes=2 * self.num_parameters,
            memory_bytes={arm.name: arm.memory_bytes or {} for arm in dry_run_of(preflight(parse_recipe(tree))).arms},
            candidates=in_order(candidates),
            advised=best.name,
            way=way,
            tokens_needed=tokens_needed(best, self.budget, num_tokens) if way == "not known" else None,
            kept=kept,
            sensitivity=None if sensitivity is None else sensitivity.answer,
            answer="",
            recipe=RECIPE,
        )
        found = found.model_copy(update={"answer": answer_in_words(found)})
        said = "".join(f"# {line}\n" for line in ("by qatrun advise", *found.answer.split("; ")))
        replace_file(self.folder / RECIPE, (said + as_yaml(tree)).encode())
        return found

    def _tree(self, name: str, *, trains: bool, kept: Sequence[str] = ()) -> dict[str, Any]:
        kind = next(kind for kind in KINDS if kind.name == name)
        return advised_tree(self.recipe, self.arm, kind, self.budget, self.hardware, trains=trains, kept=kept)

    def _made(self, kind: Kind) -> tuple[Arm, QuantPlan] | str:
        """The arm of a candidate and its plan; or why there is none."""
        try:
            arm = parse_recipe(self._tree(kind.name, trains=False)).arm_by_name[kind.format]
            assert arm.qat is not None
            plan = make_plan(self.empty, arm.qat, self.seen)
        except InputError as error:
            return error.problems[0].message
        return arm, calibrated_plan(plan, keeps_unscaled=True)

    def _scores(self, made: Mapping[str, tuple[Arm, QuantPlan]]) -> dict[str, TextScore]:
        """Of the plain model and of each candidate; those that an earlier run found are taken as they are."""
        file = self.folder / MEASURED
        rows = read_rows(file, ScoredRow, skip_damaged=True) if file.is_file() else []
        scores = {row["name"]: TextScore.model_validate(row["score"]) for row in rows}
        names = (PLAIN, *made)
        with closing(RowsFile(file, rows)) as kept:
            for number, name in enumerate(names, start=1):
                if name not in scores:
                    self.display.begin_scoring(f"{name} on held-out text")
                    scores[name] = self._score(made.get(name))
                    kept.append(ScoredRow(name=name, score=scores[name].to_dict()))
                self.display.on_scored("candidates", number, len(names))
        return scores

    def _score(self, made: tuple[Arm, QuantPlan] | None) -> TextScore:
        arm, plan = made or (self.arm, None)
        model_config = arm.model.model_copy(
            update={"compute_dtype": arm.model.param_dtype}
        )  # so only quantization shows
        with bfloat16_products():
            if plan is None:
                model: Any = on_device(load_model(model_config, DTYPES[model_config.param_dtype])).eval()
            else:
                assert arm.qat is not None
                how = arm.qat.calibrating
                batches = self.data.train.take(how.sequences).input_ids.split(self.at_once)
                if all(scheme.per_row for scheme in plan.slots().values()) and how.smooth is None:
                    batches = batches[:1]  # every scale is found from the tensor at hand
                arm = arm.model_copy(update={"model": model_config})
                model = calibrated(arm, ArmFolder(Path(START)), plan, batches, how)
            texts = score_texts(model, {HELD_OUT: self.data.valid}, batch_size=self.at_once)
        return texts.texts[HELD_OUT]

    def _candidate(self, kind: Kind, made: tuple[Arm, QuantPlan] | str, scores: Mapping[str, TextScore]) -> Candidate:
        found = Candidate(
            name=kind.name,
            format=kind.format,
            weight=kind.weight,
            input=kind.input,
            calibration=dict(kind.calibration),
            weight_bytes=None,
            nats=None,
            ci95=None,
            verdict=None,
            runs=None,
            why=made if isinstance(made, str) else "",
        )
        if isinstance(made, str):
            return found
        arm, plan = made
        rate = rise(scores[PLAIN], scores[kind.name])
        interval = list(rate.interval(1 - 0.05 / len(KINDS)))
        update: dict[str, Any] = {
            "weight_bytes": 2 * self.num_parameters - coverage(self.empty, plan, self.seen).quantized_weights,
            "nats": rate.mean,
            "ci95": interval,
            "verdict": verdict_of(interval, self.budget),
        }
        if self.hardware is not None:
            assert arm.qat is not None
            here = answer(self.hardware, arm.qat.schemes["weight"], arm.qat.schemes["input"])
            update |= {"runs": here.runs, "why": "" if here.is_native else here.why}
        return found.model_copy(update=update)

    def _sensitivity(self, best: Candidate, *, overwrite: bool) -> Sensitivity:
        """Of the candidate's linears, on the same budget."""
        tree = self._tree(best.name, trains=True)
        replace_file(self.folder / RECIPE, as_yaml(tree).encode())  # for the fragment to extend
        return find_sensitivity(
            parse_recipe(tree),
            self.display,
            source=str(self.folder / RECIPE),
            arm=best.format,
            budget=f"{100 * math.expm1(self.budget):f}%",
            output=self.folder.with_name(f"{self.folder.name}-{best.name}"),
            overwrite=overwrite,
        )[1]


def _worth_keeping(found: Sensitivity, budget: float) -> list[str]:
    """Linears that leave so little, measured, that calibration is enough: few, and the whole interval within the budget."""
    kept = [group for group in found.groups if group.kept]
    interval = None if found.choice is None else found.choice.perplexity_ci95_percent
    if interval is None or found.flat or sum(group.share for group in kept) > keeping.QUARTER:
        return []
    return [name for group in kept for name in group.linears] if interval[1] <= 100 * math.expm1(budget) else []
