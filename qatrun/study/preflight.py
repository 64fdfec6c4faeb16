"""All that can be known before a run without loading weights: what `qatrun check` shows and `train` makes sure of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate.tracking import get_available_trackers
from torch import nn

from qatrun.data import check_data, count_tokens
from qatrun.errors import InputError, Problem
from qatrun.evaluate import paired
from qatrun.evaluate.plan import TaskPlan, plan_tasks
from qatrun.layout import START
from qatrun.model import architecture, check_model, text_config
from qatrun.quant import (
    Coverage,
    QuantPlan,
    Survey,
    calibrated_plan,
    coverage,
    make_plan,
    survey,
)
from qatrun.recipe import Arm, Recipe
from qatrun.recipe.rules import arm_warnings
from qatrun.records.dryrun import DryRun, DryRunArm, DryRunTask
from qatrun.study.environment import runs_on
from qatrun.study.estimate import disk_bytes, memory_bytes, phases
from qatrun.study.schemes import calibration_lines, export_problems, on_hardware, scheme_warnings, schemes_text
from qatrun.study.segments import matched_settings
from qatrun.study.teacher import TeacherKey, check_teacher, teacher_key, teacher_text
from qatrun.tokenizer import load_tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Preflight:
    """What a recipe would do.

    Attributes:
        arms: by name, resolved.
        plans: arm -> what it quantizes; None for a BF16 arm.
        coverages: arm -> how much that is; BF16 arms are left out.
        teachers: arm -> parameters of the teacher that it learns from; arms without one are left out.
        num_parameters: of the recipe's model, tied ones counted once.
        tasks: what would be scored.
        problems: what stands in the way; empty where the recipe can run here and now.
        warnings: what can be run, but is hardly meant.
        processes: that are to train together.
        calibrations: arm -> how its scales are found without training, in words; those that have none are left out.
        runs: arm -> what of it the target's hardware runs natively, a line a scheme.
    """

    recipe: Recipe
    arms: Mapping[str, Arm]
    plans: Mapping[str, QuantPlan | None]
    coverages: Mapping[str, Coverage]
    teachers: Mapping[str, int]
    num_parameters: int
    config: Any
    tasks: list[TaskPlan]
    problems: list[Problem]
    warnings: list[Problem]
    processes: int
    runs: Mapping[str, list[str]]
    calibrations: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def can_train(self) -> bool:
        """Whether nothing but benchmarks stands in the way."""
        return all(problem.key.startswith("eval.") for problem in self.problems)

    def dry_run(self) -> DryRun:
        """What of it is shown."""
        quantized = {name: covered.quantized_weights for name, covered in self.coverages.items()}
        known = self.config is not None
        text_tokens = self._text_tokens() if self.can_train else {}
        return DryRun(
            name=self.recipe.name,
            folder=str(Path(self.recipe.output_dir) / self.recipe.name),
            model=self.recipe.model.path,
            seeds=None if self.recipe.train.seeds is None else list(self.recipe.train.seeds),
            runs_on=runs_on(),
            num_parameters=self.num_parameters if known else None,
            arms=[self._dry_run_of_arm(name, arm, text_tokens.get(name)) for name, arm in self.arms.items()],
            disk_bytes=disk_bytes(self.arms, self.num_parameters, quantized) if known else None,
            tasks=[self._dry_run_of_task(task) for task in self.tasks],
            assumed_discordance=paired.TYPICAL_DISCORDANCE,
            problems=[str(problem) for problem in self.problems],
            warnings=[str(problem) for problem in self.warnings],
            processes=self.processes,
        )

    def _text_tokens(self) -> dict[str, int | None]:
        """Arm -> tokens of one pass over its training text."""
        tokenizer = load_tokenizer(self.recipe.model)  # that of all arms
        sources = {name: arm.data.train for name, arm in self.arms.items()}
        texts = {source.model_dump_json(): source for source in sources.values()}
        counted = {text: count_tokens(source, "data.train", tokenizer) for text, source in texts.items()}
        return {name: counted[source.model_dump_json()] for name, source in sources.items()}

    def _dry_run_of_arm(self, name: str, arm: Arm, text_tokens: int | None) -> DryRunArm:
        covered = self.coverages.get(name)
        memory = None
        if all(hasattr(self.config, key) for key in ("hidden_size", "num_hidden_layers", "vocab_size")):
            num_quantized = covered.quantized_weights if covered else 0
            sizes = self.num_parameters, num_quantized, self.config, self.processes, self.teachers.get(name)
            memory = memory_bytes(arm, *sizes)
            memory = {phase: size for phase, size in memory.items() if phase in phases(arm)}
        tokens_per_step = arm.train.global_batch_size * arm.data.seq_len
        return DryRunArm(
            name=name,
            twin=arm.twin,
            steps=arm.train.steps,
            warmup_steps=arm.warmup.steps,
            switch_step=arm.switch_step,
            learning_rate=arm.train.learning_rate,
            tokens_per_step=tokens_per_step,
            tokens=tokens_per_step * arm.train.steps,
            coverage=str(covered) if covered is not None else None,
            roles=schemes_text(arm.qat, covered) if arm.qat is not None else [],
            method=arm.method,
            calibration=self.calibrations.get(name, []),
            memory_bytes=memory,
            export=list(arm.export) if arm.qat is not None else [],
            teacher=teacher_text(arm),
            runs=self.runs.get(name, []),
            text_tokens=text_tokens,
        )

    def _dry_run_of_task(self, task: TaskPlan) -> DryRunTask:
        detectable = 100 * paired.detectable_drop(task.num_items) if task.num_items else None
        return DryRunTask(**vars(task), budget_pp=self.recipe.budget[task.name] or 0.0, detectable_drop_pp=detectable)


def preflight(recipe: Recipe, processes: int = 1, hardware: str | None = None) -> Preflight:
    """Look at model architecture, patterns, data columns and benchmark data; collects every problem instead of raising.

    Args:
        processes: that are to train together.
        hardware: what it is to be served on, in place of the recipe's target.
    """
    hardware = hardware or recipe.target.hardware
    runs: dict[str, list[str]] = {}
    arms = recipe.arm_by_name
    problems: list[Problem] = []
    warnings: list[Problem] = []
    plans: dict[str, QuantPlan | None] = {}
    coverages: dict[str, Coverage] = {}
    calibrations: dict[str, list[str]] = {}
    models: dict[str, nn.Module | None] = {}
    tokenizers: dict[str, Any] = {}
    checked_data: set[tuple[str, str]] = set()
    surveys: dict[str, Survey] = {}
    teachers: dict[TeacherKey | None, int | None] = {None: None}
    for name, arm in arms.items():
        key = arm.model.model_dump_json()
        if key not in models:
            empty = models[key] = _collect(partial(architecture, arm.model), problems, name, recipe)
            tokenizers[key] = None
            if empty is not None:
                _collect(partial(check_model, arm.model, empty), problems, name, recipe)
                tokenizers[key] = _collect(partial(load_tokenizer, arm.model), problems, name, recipe)
        model, qat = models[key], arm.qat
        plan = None
        if model is not None and qat is not None:
            seen = surveys[key] if key in surveys else surveys.setdefault(key, survey(model))
            plan = _collect(partial(make_plan, model, qat, seen), problems, name, recipe)
            if plan is not None and not arm.trains:
                plan = calibrated_plan(plan, keeps_unscaled=True)
        plans[name] = plan
        if model is not None and plan is not None:
            coverages[name] = coverage(model, plan, surveys[key])
            if lines := list(calibration_lines(arm, plan, model)):
                calibrations[name] = lines
            problems += [_named(problem, name, recipe) for problem in export_problems(arm, plan, model)]
            odd = [*scheme_warnings(arm, plan, model, surveys[key])]
            warnings += [_named(problem, name, recipe) for problem in odd]
            if hardware is not None:
                runs[name], odd = on_hardware(arm, coverages[name], hardware)
                warnings += odd
        if model is not None:
            problems += [_named(problem, name, recipe) for problem in _context_problems(arm, model)]
        if model is not None and tokenizers[key] is not None and (taught := teacher_key(arm)) not in teachers:
            check = partial(check_teacher, arm, model, tokenizers[key])
            teachers[taught] = _collect(check, problems, name, recipe)
        if (data := (key, arm.data.model_dump_json())) not in checked_data:
            checked_data.add(data)
            odd = []
            problems += [_named(problem, name, recipe) for problem in check_data(arm.data, tokenizers[key], odd.append)]
            warnings += [_named(problem, name, recipe) for problem in odd]
        found = [Problem(finding.message, ".".join(map(str, finding.keys[0]))) for finding in arm_warnings(arm)]
        warnings += [_named(problem, name, recipe) for problem in found]
    problems += [*_start_problems(arms), *_twin_problems(arms)]
    problems += [
        _named(problem, name, recipe)
        for name, arm in arms.items()
        if arm.trains
        for problem in _sharing_problems(arm, processes)
    ]
    data_dir = Path(recipe.eval.data_dir) if recipe.eval.data_dir else None
    tasks = plan_tasks(recipe.eval.tasks, data_dir=data_dir, limit=recipe.eval.limit)
    problems += [Problem(task.missing, f"eval.tasks.{task.name}") for task in tasks if task.missing]
    first = next((model for model in models.values() if model is not None), None)
    return Preflight(
        recipe=recipe,
        arms=arms,
        plans=plans,
        coverages=coverages,
        teachers={name: size for name, arm in arms.items() if (size := teachers.get(teacher_key(arm))) is not None},
        num_parameters=sum(p.numel() for p in first.parameters()) if first is not None else 0,
        config=text_config(first) if first is not None else None,
        tasks=tasks,
        problems=list(dict.fromkeys(problems)),
        warnings=list(dict.fromkeys(warnings)),
        processes=processes,
        calibrations=calibrations,
        runs=runs,
    )


TRACKER_PACKAGES = {
    "tensorboard": "'qatrun[track]'",
    **{name: name for name in ("wandb", "mlflow", "aim", "comet_ml", "clearml", "dvclive", "swanlab", "trackio")},
}


def tracker_problems(names: Sequence[str]) -> list[Problem]:
    """A problem for each tracker that Accelerate does not know or that is not installed; it would leave those out."""
    installed = sorted({"all", *map(str, get_available_trackers())})
    return [
        Problem(
            f"--track {name}: not installed: pip install {TRACKER_PACKAGES[name]}"
            if name in TRACKER_PACKAGES
            else f"--track {name}: no such tracker here (one of {', '.join(installed)})"
        )
        for name in names
        if name not in installed
    ]


def _context_problems(arm: Arm, model: nn.Module) -> Iterator[Problem]:
    context = getattr(text_config(model), "max_position_embeddings", None)
    if context is not None and 0 < context < arm.data.seq_len:  # -1: any number will do
        yield Problem(f"{arm.data.seq_len} tokens do not fit the model's context of {context}", "data.seq_len")


def _sharing_problems(arm: Arm, processes: int) -> Iterator[Problem]:
    """Batches that processes cannot share: all must make the same number of forwards."""
    train, at_once = arm.train, arm.train.micro_batch_size * processes
    if train.global_batch_size % at_once:
        below = train.global_batch_size // at_once * at_once
        nearest = " or ".join(str(size) for size in (below, below + at_once) if size)
        yield Problem(
            f"{train.global_batch_size} sequences are no whole number of micro-batches of {train.micro_batch_size} for each "
            f"of {processes} processes; {nearest} would be, or a smaller train.micro_batch_size",
            "train.global_batch_size",
        )


def _start_problems(arms: Mapping[str, Arm]) -> Iterator[Problem]:
    """Arms that start from another model: their scores would stand beside a start that is not theirs."""
    first = next(iter(arms.values())).model
    for name, arm in arms.items():
        if (arm.model.path, arm.model.revision) != (first.path, first.revision):
            message = f"all arms start from one model, here {first.path}; give another model a recipe of its own"
            yield Problem(message, f"arms.{name}.model.path")


def _twin_problems(arms: Mapping[str, Arm]) -> Iterator[Problem]:
    """Arms that could not be compared with their twins once both are trained."""
    for name, arm in arms.items():
        if arm.twin is None:
            continue
        # The start model is scored on the first arm's text.
        twin = arms[next(iter(arms)) if arm.twin == START else arm.twin]
        of_arm, of_twin = (_comparable_settings(each, trained=arm.trains) for each in (arm, twin))
        differing = [key for key in of_arm if of_arm[key] != of_twin[key]]
        if differing:
            message = f"its twin '{arm.twin}' has other {', '.join(differing)}: name a twin that does not, or add one"
            yield Problem(message, f"arms.{name}.twin")


def _comparable_settings(arm: Arm, *, trained: bool) -> dict[str, Any]:
    settings = matched_settings(arm) if trained else {"model": arm.model.model_dump(mode="json")}
    return {**settings, "data": arm.data.model_dump()}


def _collect(make: Callable[[], T], problems: list[Problem], arm: str, recipe: Recipe) -> T | None:
    """The value, or None and its problems, each named by the key where the arm sets it."""
    try:
        return make()
    except InputError as error:
        problems += [_named(problem, arm, recipe) for problem in error.problems]
        return None


def _named(problem: Problem, arm: str, recipe: Recipe) -> Problem:
    overrides: Any = recipe.arms[arm]
    for part in re.sub(r"\[\d+\].*", "", problem.key).split("."):  # a list is an arm's as a whole
        if not isinstance(overrides, Mapping) or part not in overrides:
            return problem
        overrides = overrides[part]
    return Problem(problem.message, f"arms.{arm}.{problem.key}", problem.where)
