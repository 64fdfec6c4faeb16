"""`qatrun eval`: score any checkpoint as it stands."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from qatrun.data import Batch
from qatrun.errors import InputError, Problem
from qatrun.evaluate.attribution import HELD_OUT, nats_a_token
from qatrun.evaluate.scores import Scores
from qatrun.evaluate.tasks import check_available
from qatrun.evaluate.text import perplexity
from qatrun.export import artifact
from qatrun.files import content_sha256, write_json
from qatrun.layout import PLAN_FILE, SCORED_FILE, WEIGHTS_FILES, StudyFolder
from qatrun.model import TRUST_KEY, TRUSTED, load_config
from qatrun.recipe import EvalConfig, ModelConfig, load_recipe
from qatrun.records.scores import ReadText, ScoredModel, ScoredTask, TextScore
from qatrun.study.display import ScoringDisplay
from qatrun.study.engine import engine_of, exported_from, score_in_engine
from qatrun.study.joint import open_plain, score_together
from qatrun.study.reading import text_to_read
from qatrun.tokenizer import load_tokenizer

# The tasks and few-shot counts of the published study (arXiv:2605.26189).
DEFAULT_TASKS = {"mmlu": 5, "hellaswag": 10, "arc_challenge": 25}
TRUST_OPTION = "--trust-remote-code"


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
    elif (source := exported_from(arm)) is not None:
        arm = source.path
    recipe = StudyFolder(arm.parent).recipe
    base = load_recipe(recipe).eval if recipe.is_file() else EvalConfig(tasks=DEFAULT_TASKS)
    known = {**DEFAULT_TASKS, **base.tasks}
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else list(base.tasks)
    if not names:
        raise InputError("--tasks names no task")
    wanted = {name: known.get(name, 0) if num_fewshot is None else num_fewshot for name in names}
    given = {"limit": limit, "data_dir": data_dir, "batch_size": batch_size}
    return base.model_copy(update={"tasks": wanted} | {key: value for key, value in given.items() if value is not None})


def score_path(
    path: str,
    config: EvalConfig,
    display: ScoringDisplay,
    output: Path | None,
    *,
    engine: str | None = None,
    text: str | None = None,
    trust_remote_code: bool = False,
) -> ScoredModel:
    """Score a checkpoint. One of ours runs with quantizers on, an exported folder in an engine, a plain model in its
    config's dtype.

    Args:
        engine: one of `evaluate.engines` to open a folder with; None: that of an export, else none.
        text: to read for a perplexity; None: the held-out text of the study that the model is of, if any; not in an
            engine.
        trust_remote_code: run code that comes with the model. That a study's recipe trusted it is not enough: the recipe
            may have come with the model too.
    Raises:
        InputError: no model or tokenizer there, or a task that cannot be scored.
    """
    source = ModelConfig(path=path, trust_remote_code=trust_remote_code)
    data_dir = Path(config.data_dir) if config.data_dir else None
    opened_by = engine_of(Path(path), engine)
    problems = [] if opened_by else _path_problems(source)
    if opened_by and text is not None:
        problems.append(Problem("--text: a text is read by models of ours and plain ones, not in an engine"))
    if problems := problems + check_available(config.tasks, data_dir=data_dir):
        raise InputError(problems)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)  # a path that cannot be is known before minutes of scoring
    weights = {str(file): content_sha256(file) for file in _weights(Path(path))}
    match, read = None, None
    if opened_by is not None:
        scores, match = score_in_engine(
            Path(path), config, opened_by, display, output, trust_remote_code=trust_remote_code
        )
        what = f"{path} (in {opened_by})"
    else:
        scores, read, what = _score_here(source, config, display, output, text)
    tasks = [
        ScoredTask(
            name=name,
            metric=task.metric,
            num_fewshot=task.num_fewshot,
            num_items=task.num_items,
            accuracy=task.accuracy,
            stderr=task.stderr,
            num_truncated=task.num_truncated,
            others=dict(task.others),
        )
        for name, task in scores.tasks.items()
    ]
    scored = ScoredModel(
        model=what,
        settings=dict(scores.settings),
        tasks=tasks,
        text=read,
        weights=weights,
        output=str(output) if output else None,
        match=match,
    )
    if output is not None:
        write_json(output / SCORED_FILE, scored)
    return scored


def _score_here(
    source: ModelConfig, config: EvalConfig, display: ScoringDisplay, output: Path | None, text: str | None
) -> tuple[Scores, ReadText | None, str]:
    """(scores, what was read, what was scored in words) of a model that is opened here, and by all processes."""
    reads = _text_to_read(source, text, display)
    texts = {} if reads is None else {HELD_OUT: reads}
    display.begin_scoring(Path(source.path).name)
    quantized = artifact.find(Path(source.path))
    scores, read = score_together(partial(_open, source, quantized), config, output, display, texts=texts)
    what = f"{quantized} (quantizers on, scales frozen)"
    if quantized is None:
        what = f"{source.path} (plain model, {scores.settings['dtype']})"
    return scores, _read(read.texts[HELD_OUT]) if texts else None, what


def _text_to_read(source: ModelConfig, text: str | None, display: ScoringDisplay) -> Batch | None:
    """Before weights are loaded: a text that cannot be read is known at once."""
    quantized = artifact.find(Path(source.path))
    opened = source if quantized is None else source.model_copy(update={"path": str(quantized)})
    context = getattr(load_config(opened).get_text_config(decoder=True), "max_position_embeddings", None)
    return text_to_read(Path(source.path), text, load_tokenizer(opened), context, display)


def _read(score: TextScore) -> ReadText:
    rate = nats_a_token(score)
    low, high = rate.interval()
    return ReadText(
        perplexity=perplexity(rate.mean),
        ci95=[perplexity(low), perplexity(high)],
        num_sequences=rate.num_clusters,
        num_tokens=rate.num_units,
    )


def _weights(path: Path) -> list[Path]:
    """Files that decide what was scored, of a folder that lies here."""
    folder = artifact.find(path) or path
    return sorted(file for pattern in (WEIGHTS_FILES, PLAN_FILE) for file in folder.glob(pattern))


def _path_problems(source: ModelConfig) -> list[Problem]:
    """Why there is no model, or none with a tokenizer, found without loading weights."""
    path = source.path
    study = StudyFolder(Path(path))
    if study.recipe.is_file():
        of_one_seed = study.replicas[0] if study.replicas else study
        arms = ", ".join(str(of_one_seed.arm(name).path) for name in load_recipe(study.recipe).arm_names)
        return [Problem(f"{path} is a study; score one of its arms: {arms}")]
    quantized = artifact.find(Path(path))
    try:
        if quantized is not None:
            source = source.model_copy(update={"path": str(quantized)})
            artifact.read_plan(quantized)
        load_config(source)
        load_tokenizer(source)
    except InputError as error:
        return [_without_key(problem) for problem in error.problems]
    return []


def _without_key(problem: Problem) -> Problem:
    """A problem of a recipe's model, where there is no recipe."""
    if problem.key == TRUST_KEY:
        return Problem(problem.message.replace(TRUSTED, TRUST_OPTION))
    return Problem(problem.message)


def _open(source: ModelConfig, quantized: Path | None) -> tuple[Any, Any]:
    try:
        if quantized is not None:
            return artifact.load(quantized, trust_remote_code=source.trust_remote_code)
        return open_plain(source, "auto")
    except InputError as error:
        raise InputError([_without_key(problem) for problem in error.problems]) from error
