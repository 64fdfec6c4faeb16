"""All that can be known before a run without loading weights: what `qatrun check` shows and `train` makes sure of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate.tracking import get_available_trackers
from torch import nn

from qatrun.data import check_data
from qatrun.errors import InputError, Problem
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
from qatrun.study.schemes import calibration_lines, export_problems, on_hardware, scheme_warnings
from qatrun.study.segments import matched_settings
from qatrun.study.teacher import TeacherKey, check_teacher, teacher_key
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


def preflight(recipe: Recipe, processes: int = 1, hardware: str | None = None) -> Preflight:
    """Look at model architecture, patterns, data columns and benchmark data; collects every problem instead of raising.

    Args:
        processes: that are to train together.
        hardware: what it is to be served on, in place of the recipe's target.
    """
    look = _Look(recipe, hardware or recipe.target.hardware)
    arms = recipe.arm_by_name
    for name, arm in arms.items():
        look.at_arm(name, arm)
    look.problems += [*_start_problems(arms), *_twin_problems(arms)]
    for name, arm in arms.items():
        if arm.trains:
            look.found(_sharing_problems(arm, processes), name)
    data_dir = Path(recipe.eval.data_dir) if recipe.eval.data_dir else None
    tasks = plan_tasks(recipe.eval.tasks, data_dir=data_dir, limit=recipe.eval.limit)
    look.problems += [Problem(task.missing, f"eval.tasks.{task.name}") for task in tasks if task.missing]
    first = next((model for model in look.models.values() if model is not None), None)
    teachers = {name: look.teachers.get(teacher_key(arm)) for name, arm in arms.items()}
    return Preflight(
        recipe=recipe,
        arms=arms,
        plans=look.plans,
        coverages=look.coverages,
        teachers={name: size for name, size in teachers.items() if size is not None},
        num_parameters=sum(p.numel() for p in first.parameters()) if first is not None else 0,
        config=text_config(first) if first is not None else None,
        tasks=tasks,
        problems=list(dict.fromkeys(look.problems)),
        warnings=list(dict.fromkeys(look.warnings)),
        processes=processes,
        calibrations=look.calibrations,
        runs=look.runs,
    )


class _Look:
    """A preflight while it looks, arm after arm; what arms share (model, text, teacher) is looked at once."""

    def __init__(self, recipe: Recipe, hardware: str | None) -> None:
        self.recipe, self.hardware = recipe, hardware
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.models: dict[str, nn.Module | None] = {}
        self.teachers: dict[TeacherKey | None, int | None] = {None: None}
        self.plans: dict[str, QuantPlan | None] = {}
        self.coverages: dict[str, Coverage] = {}
        self.calibrations: dict[str, list[str]] = {}
        self.runs: dict[str, list[str]] = {}
        self._tokenizers: dict[str, Any] = {}
        self._surveys: dict[str, Survey] = {}
        self._texts: set[tuple[str, str]] = set()

    def found(self, problems: Iterable[Problem], arm: str, *, warning: bool = False) -> None:
        """Keep what stands in the way, or is hardly meant, named by the key where the arm sets it."""
        (self.warnings if warning else self.problems).extend(_named(problem, arm, self.recipe) for problem in problems)

    def at_arm(self, name: str, arm: Arm) -> None:
        """Everything that an arm by itself shows."""
        key = arm.model.model_dump_json()
        if key not in self.models:
            self._at_model(key, name, arm)
        model, tokenizer = self.models[key], self._tokenizers[key]
        self.plans[name] = None
        if model is not None:
            if arm.qat is not None:
                self._at_quantization(key, model, name, arm)
            self.found(_context_problems(arm, model), name)
            if tokenizer is not None and (taught := teacher_key(arm)) not in self.teachers:
                self.teachers[taught] = self._collect(partial(check_teacher, arm, model, tokenizer), name)
        if (text := (key, arm.data.model_dump_json())) not in self._texts:
            self._texts.add(text)
            odd: list[Problem] = []
            self.found(check_data(arm.data, tokenizer, odd.append), name)
            self.found(odd, name, warning=True)
        ruled = (Problem(finding.message, ".".join(map(str, finding.keys[0]))) for finding in arm_warnings(arm))
        self.found(ruled, name, warning=True)

    def _at_model(self, key: str, name: str, arm: Arm) -> None:
        model = self.models[key] = self._collect(partial(architecture, arm.model), name)
        self._tokenizers[key] = None
        if model is not None:
            self._collect(partial(check_model, arm.model, model), name)
            self._tokenizers[key] = self._collect(partial(load_tokenizer, arm.model), name)

    def _at_quantization(self, key: str, model: nn.Module, name: str, arm: Arm) -> None:
        assert arm.qat is not None
        if key not in self._surveys:
            self._surveys[key] = survey(model)
        seen = self._surveys[key]
        plan = self._collect(partial(make_plan, model, arm.qat, seen), name)
        if plan is None:
            return
        if not arm.trains:
            plan = calibrated_plan(plan, keeps_unscaled=True)
        self.plans[name] = plan
        covered = self.coverages[name] = coverage(model, plan, seen)
        if lines := list(calibration_lines(arm, plan, model)):
            self.calibrations[name] = lines
        self.found(export_problems(arm, plan, model), name)
        self.found(scheme_warnings(arm, plan, model, seen), name, warning=True)
        if self.hardware is not None:
            self.runs[name], odd = on_hardware(arm, covered, self.hardware)
            self.warnings += odd

    def _collect(self, make: Callable[[], T], arm: str) -> T | None:
        """The value, or None and its problems."""
        try:
            return make()
        except InputError as error:
            self.found(error.problems, arm)
            return None


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


def _named(problem: Problem, arm: str, recipe: Recipe) -> Problem:
    overrides: Any = recipe.arms[arm]
    for part in re.sub(r"\[\d+\].*", "", problem.key).split("."):  # a list is an arm's as a whole
        if not isinstance(overrides, Mapping) or part not in overrides:
            return problem
        overrides = overrides[part]
    return Problem(problem.message, f"arms.{arm}.{problem.key}", problem.where)
