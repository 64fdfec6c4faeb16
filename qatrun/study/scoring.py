"""`qatrun eval`: score any checkpoint as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qatrun.errors import InputError, Problem
from qatrun.evaluate.harness import score
from qatrun.evaluate.tasks import check_available
from qatrun.export import artifact
from qatrun.model import load_config, load_model, on_device
from qatrun.recipe import EvalConfig, ModelConfig, load_recipe
from qatrun.records.scores import ScoredModel, ScoredTask
from qatrun.study.display import ScoringDisplay
from qatrun.study.layout import StudyFolder
from qatrun.tokenizer import load_tokenizer

# The tasks and few-shot counts of the published study (arXiv:2605.26189).
DEFAULT_TASKS = {"mmlu": 5, "hellaswag": 10, "arc_challenge": 25}


def eval_config(
    path: str,
    *,
    tasks: str | None,
    limit: int | None,
    num_fewshot: int | None,
    data_dir: str | None,
    batch_size: int | None,
) -> EvalConfig:
    """What to score: a study's own settings for one of its arms, else the defaults, with what was asked for on top."""
    arm = Path(path).resolve()
    if artifact.find(Path(path)) == Path(path):  # the quantized folder inside an arm's
        arm = arm.parent
    recipe = StudyFolder(arm.parent).recipe
    base = load_recipe(recipe).eval if recipe.is_file() else EvalConfig(tasks=DEFAULT_TASKS)
    known = {**DEFAULT_TASKS, **base.tasks}
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else list(base.tasks)
    if not names:
        raise InputError("--tasks names no task")
    wanted = {name: known.get(name, 0) if num_fewshot is None else num_fewshot for name in names}
    given = {"limit": limit, "data_dir": data_dir, "batch_size": batch_size}
    return base.model_copy(update={"tasks": wanted} | {key: value for key, value in given.items() if value is not None})


def score_path(path: str, config: EvalConfig, display: ScoringDisplay, output: Path | None) -> ScoredModel:
    """Score a checkpoint. One of ours runs with quantizers on, a plain model in its config's dtype.

    Raises:
        InputError: no model there, or a task that cannot be scored.
    """
    data_dir = Path(config.data_dir) if config.data_dir else None
    problems = _path_problems(path) + check_available(config.tasks, data_dir=data_dir)
    if problems:
        raise InputError(problems)
    model, tokenizer, what = _open(path)
    display.begin_scoring(Path(path).name)
    scores = score(on_device(model), tokenizer, config, output_dir=output, on_progress=display.on_scored)
    tasks = [
        ScoredTask(
            name=name,
            metric=task.metric,
            num_fewshot=task.num_fewshot,
            num_items=task.num_items,
            accuracy=task.accuracy,
            stderr=task.stderr if task.num_items > 1 else None,
            num_truncated=task.num_truncated,
        )
        for name, task in scores.tasks.items()
    ]
    kept = str(output) if output else None
    return ScoredModel(model=what, settings=dict(scores.settings), tasks=tasks, output=kept)


def _path_problems(path: str) -> list[Problem]:
    """Why there is no model at the path, found without loading weights."""
    study = StudyFolder(Path(path))
    if study.recipe.is_file():
        of_one_seed = study.replicas[0] if study.replicas else study
        arms = ", ".join(str(of_one_seed.arm(name).path) for name in load_recipe(study.recipe).arm_names)
        return [Problem(f"{path} is a study; score one of its arms: {arms}")]
    try:
        if artifact.find(Path(path)) is None:
            load_config(ModelConfig(path=path))
    except InputError as error:
        return [Problem(problem.message) for problem in error.problems]  # their keys are those of a recipe
    return []


def _open(path: str) -> tuple[Any, Any, str]:
    """(model, tokenizer, what they are in words)."""
    quantized = artifact.find(Path(path))
    if quantized is not None:
        return *artifact.load(quantized), f"{quantized} (quantizers on, scales frozen)"
    source = ModelConfig(path=path)
    model, tokenizer = load_model(source, "auto"), load_tokenizer(source)
    return model, tokenizer, f"{path} (plain model, {str(model.dtype).removeprefix('torch.')})"
