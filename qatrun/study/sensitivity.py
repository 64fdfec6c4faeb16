"""`qatrun sensitivity`: what each input group of a recipe's start model costs, which to leave in BF16 for a budget, and what
that choice then costs, measured.

training text -> calibrated scales -> a cost for each group -> the choice -> held-out text: all quantized, the choice
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from qatrun.data import IGNORE_INDEX, Batch, open_data
from qatrun.errors import InputError, NonFiniteError, Problem
from qatrun.evaluate.paired import Rate
from qatrun.evaluate.text import perplexity
from qatrun.files import read_rows, replace_file, write_json
from qatrun.layout import START, ArmFolder, StudyFolder
from qatrun.model import architecture
from qatrun.numerics import bfloat16_products
from qatrun.quant import QuantPlan
from qatrun.quant.calibration import calibrated_plan
from qatrun.quant.sensitivity import (
    Cost,
    costs_by_one_backward,
    costs_one_at_a_time,
    divergences,
    input_groups,
    quantizing,
)
from qatrun.recipe import Arm, CalibrationConfig, Recipe
from qatrun.records.sensitivity import Budget, CostRow, MeasuredCost, Sensitivity
from qatrun.report.page.sensitivity_page import curve_svg, sensitivity_document
from qatrun.study import keeping
from qatrun.study.display import ScoringDisplay
from qatrun.study.inputs import describe_inputs
from qatrun.study.keeping_recipe import keeping_recipe
from qatrun.study.measuring import budget_of, preflight_to_measure, saying_what_is_saved, sequences_at_once
from qatrun.study.output import claimed_output
from qatrun.study.page import write_document
from qatrun.study.variants import calibrated
from qatrun.text import suggestion
from qatrun.tokenizer import load_tokenizer
from qatrun.train.metrics import RowsFile

RESULT, COSTS, CURVE, FRAGMENT = "sensitivity.json", "costs.jsonl", "curve.svg", "keep.yaml"
OWN = (RESULT, COSTS, CURVE, FRAGMENT)
ALL = "all together"  # as a group of costs.jsonl
AT_ONCE = 4  # sequences of a batch: what a stop loses


def find_sensitivity(
    recipe: Recipe,
    display: ScoringDisplay,
    *,
    source: str,
    overrides: Sequence[str] = (),
    arm: str | None = None,
    budget: str | None = None,
    exact: bool = False,
    sequences: int = 16,
    output: Path | None = None,
    overwrite: bool = False,
) -> tuple[Path, Sensitivity]:
    """Score every input group, choose which to keep in BF16, and measure that.

    Args:
        source, overrides: what the recipe was loaded from, for the recipe that is written to extend it.
        arm: whose quantization; None: the first quantized arm's.
        budget: see `keeping.parse_budget`; None: the recipe's for perplexity.
        exact: score by KL, one group at a time, instead of by one backward.
        sequences: of training text that scores are of.
        output: folder; None: one beside the studies.
    Returns:
        (folder, what was found; also written there).
    Raises:
        InputError: the recipe cannot run or quantizes nothing, a budget of another kind, or a folder that is not free.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    chosen = _arm(recipe, arm)
    wanted = budget_of(recipe, budget)
    plan = preflight_to_measure(recipe).plans[chosen.name]
    assert plan is not None
    folder = output or Path(recipe.output_dir) / f"{recipe.name}-sensitivity-{chosen.name}"
    settings = {
        "model": chosen.model.model_dump(mode="json"),
        "data": chosen.data.model_dump(mode="json"),
        "plan": plan.to_dict(),
        "calibration": _calibration(chosen).model_dump(mode="json"),
        "seed": chosen.train.seed,
        "exact": exact,
        "sequences": sequences,
        "micro_batch_size": chosen.train.micro_batch_size,  # which of them are a batch
        "inputs": describe_inputs(recipe),
    }
    with claimed_output(folder, settings, OWN, overwrite=overwrite):
        search = _Search(chosen, plan, folder, display, exact=exact, sequences=sequences)
        with saying_what_is_saved(display):
            found = search.result(wanted, source)
        _write(folder, recipe, found, overrides)
    return folder, found


def _arm(recipe: Recipe, name: str | None) -> Arm:
    quantized = [each for each, arm in recipe.arm_by_name.items() if arm.qat is not None]
    if not quantized:
        raise InputError(Problem("nothing is quantized: no arm has qat", "qat"))
    if name is not None and name not in quantized:
        raise InputError(f"--arm {name}: no such quantized arm{suggestion(name, quantized)}")
    return recipe.arm_by_name[name or quantized[0]]


def _calibration(arm: Arm) -> CalibrationConfig:
    assert arm.qat is not None
    return arm.qat.calibrating


class _Search:
    """One model, attached and calibrated, with the text that its groups are scored on and that the choice is measured on."""

    def __init__(
        self, arm: Arm, plan: QuantPlan, folder: Path, display: ScoringDisplay, *, exact: bool, sequences: int
    ) -> None:
        self.arm, self.plan, self.folder, self.display, self.exact = arm, plan, folder, display, exact
        data = open_data(arm.data, load_tokenizer(arm.model), arm.train.seed)
        self.text, self.held_out = data.train.take(sequences), data.valid
        plain = arm.model.model_copy(update={"compute_dtype": arm.model.param_dtype})  # so that only quantization shows
        self.at_once = min(AT_ONCE, sequences_at_once(arm, architecture(plain)))
        self.model = calibrated(
            arm.model_copy(update={"model": plain}),
            ArmFolder(Path(START)),
            calibrated_plan(plan, keeps_unscaled=True),
            self.text.input_ids.split(self.at_once),
            _calibration(arm),
        )
        self.groups = input_groups(self.model, plan)
        self.modules = [name for group in self.groups.values() for name in group.modules]

    def result(self, budget: Budget, recipe: str) -> Sensitivity:
        with bfloat16_products():
            return self._result(budget, recipe)

    def _result(self, budget: Budget, recipe: str) -> Sensitivity:
        parts, together = self._parts()
        total = sum(part.cost.nats for part in parts.values())
        groups = keeping.ranked(parts, together / total if total else 1.0)
        curve = keeping.curve_of(groups)
        self.display.begin_scoring("what the choice costs")
        everything = self._measured(self.modules)
        number = keeping.num_kept(curve, budget)
        if budget.unit != "bits":  # whether anything is to be kept at all, the measurement decides
            number = 0 if keeping.spent(everything, budget) <= budget.value else max(1, number)
        groups = [group.model_copy(update={"kept": place < number}) for place, group in enumerate(groups)]
        kept = {name for group in groups if group.kept for name in self.groups[group.name].modules}
        choice = self._measured([name for name in self.modules if name not in kept]) if kept else None
        return Sensitivity(
            recipe=recipe,
            arm=self.arm.name,
            formats=sorted({scheme.format for schemes in self.plan.schemes.values() for scheme in schemes.values()}),
            method="one at a time" if self.exact else "one backward",
            num_tokens=(self.text.num_targets, self.held_out.num_targets),
            budget=budget,
            sum_of_parts=total,
            all_quantized=together,
            groups=groups,
            curve=curve,
            everything=everything,
            choice=choice,
            flat=keeping.is_flat(curve),
            answer=keeping.answer(groups, curve, budget, everything, choice),
            fragment=FRAGMENT if kept else None,
        )

    def _parts(self) -> tuple[dict[str, keeping.Part], float]:
        """(each group as it was scored, what all together cost), nats a token."""
        sums: dict[str, list[float]] = {}
        for row in self._rows():
            so_far = sums.setdefault(row["name"], [0.0, 0.0, 0.0])
            sums[row["name"]] = [a + b for a, b in zip(so_far, (row["nats"], row["signal"], row["noise"]), strict=True)]
        if not all(math.isfinite(value) for values in sums.values() for value in values):
            raise NonFiniteError("the model's logits are NaN or infinite on the training text")
        num_tokens = self.text.num_targets
        parts = {}
        for name, group in self.groups.items():
            of_group = [sums[name]] if self.exact else [sums[module] for module in group.modules]
            nats, signal, noise = (sum(values) for values in zip(*of_group, strict=True))
            parts[name] = keeping.Part(group.names, group.num_weights, Cost(nats / num_tokens, signal, noise))
        return parts, sums[ALL][0] / num_tokens

    def _rows(self) -> list[CostRow]:
        """All costs; those that an earlier run found are taken as they are."""
        file = self.folder / COSTS
        batches = list(self._batches(self.text))
        rows = read_rows(file, CostRow, skip_damaged=True) if file.is_file() else []
        names = [*(self.groups if self.exact else self.modules), ALL]
        done = {number: {row["name"] for row in rows if row["batch"] == number} for number in range(len(batches))}
        self.display.begin_scoring(
            f"what quantizing each of {len(names) - 1} {'groups' if self.exact else 'modules'} costs"
        )
        with closing(RowsFile(file, rows)) as kept:
            for number, batch in enumerate(batches):
                missing = [name for name in names if name not in done[number]]
                for name, cost in self._costs(batch, missing):
                    row = CostRow(batch=number, name=name, nats=cost.nats, signal=cost.signal, noise=cost.noise)
                    kept.append(row)
                    rows.append(row)
                    there = number * len(names) + len(names) - len(missing) + 1
                    missing.remove(name)
                    self.display.on_scored(name, there, len(batches) * len(names))
        return rows

    def _costs(self, batch: Batch, missing: Sequence[str]) -> Iterator[tuple[str, Cost]]:
        ids, labels = batch.input_ids, batch.labels
        everything = {ALL: tuple(self.modules)} if ALL in missing else {}
        if self.exact:
            alone = {name: group.modules for name, group in self.groups.items() if name in missing}
            yield from costs_one_at_a_time(self.model, alone | everything, ids, labels)
            return
        if modules := [name for name in self.modules if name in missing]:
            yield from costs_by_one_backward(self.model, modules, ids, labels).items()
        yield from costs_one_at_a_time(self.model, everything, ids, labels)

    @torch.no_grad()
    def _measured(self, modules: Collection[str]) -> MeasuredCost:
        """With these modules quantized, on held-out text."""
        found: list[Tensor] = []
        sizes: list[Tensor] = []
        num_sequences = len(self.held_out.input_ids)
        for batch in self._batches(self.held_out):
            with quantizing(self.model, ()):
                plain = self.model(input_ids=batch.input_ids, use_cache=False).logits
            with quantizing(self.model, modules):
                quantized = self.model(input_ids=batch.input_ids, use_cache=False).logits
            found.append(divergences(plain, quantized, batch.labels))
            sizes.append((batch.labels[:, 1:] != IGNORE_INDEX).sum(1).cpu())
            self.display.on_scored("held-out text", sum(map(len, sizes)), num_sequences)
        sums, num_targets = torch.cat(found), torch.cat(sizes)
        if not torch.isfinite(sums).all():
            raise NonFiniteError("the model's logits are NaN or infinite on the held-out text")
        kl, rise = (Rate.of(column.numpy(), num_targets.numpy()) for column in sums.unbind(1))
        several = kl.num_clusters > 1
        return MeasuredCost(
            nats=kl.mean,
            nats_ci95=list(kl.interval()) if several else None,
            perplexity_percent=_percent(rise.mean),
            perplexity_ci95_percent=[_percent(edge) for edge in rise.interval()] if several else None,
        )

    def _batches(self, text: Batch) -> Iterator[Batch]:
        for batch in text.split(self.at_once):
            yield batch.to(self.model.device)


def _percent(nats: float) -> float:
    return 100 * (perplexity(nats) - 1)


def _write(folder: Path, recipe: Recipe, found: Sensitivity, overrides: Sequence[str]) -> None:
    fragment = folder / FRAGMENT
    if found.fragment is None:
        fragment.unlink(missing_ok=True)
    else:
        replace_file(fragment, keeping_recipe(folder, recipe, found, overrides).encode())
    write_document(StudyFolder(folder), sensitivity_document(folder.name, found))
    replace_file(folder / CURVE, curve_svg(found).encode())
    write_json(folder / RESULT, found)
