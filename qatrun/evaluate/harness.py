"""lm-eval around a model in memory.

Each task is run by itself, so that its score depends on nothing but the model, the task and the settings, and equals
what the `lm_eval` command line gives for that task with `softmax_dtype=float32` and the same dtype and batch size.
lm-eval's model class is used as it is, but for four things: it does not tie the embeddings of the model it is given
(an artifact's output layer may rightly differ), it reports progress, it stops at the first NaN or Inf, and several
processes, each of which runs all of lm-eval as if alone, share out the forwards: whole batches of lm-eval's own order, so
that each keeps its neighbours and its padding, and scores are to the bit those of one process. An engine that gives no
logits away, as vLLM, is asked through lm-eval's class for it.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qatrun.errors import InputError, NonFiniteError, Problem
from qatrun.evaluate.context import FEWSHOT_SEED, evaluation_mode, quiet, seeded
from qatrun.evaluate.engines import OwnModel
from qatrun.evaluate.scores import ItemScores, Scores, TaskScore, pad_choices
from qatrun.evaluate.tasks import BuiltTask, build_task
from qatrun.evaluate.templates import sandboxed_templates
from qatrun.files import replace_file
from qatrun.layout import SAMPLES, SCORES_OF_LM_EVAL
from qatrun.ranks import world
from qatrun.recipe import EvalConfig

SOFTMAX_DTYPE = "float32"

# Task, requests done, requests in all; a request is one choice of one item.
Progress = Callable[[str, int, int], None]
_Request = tuple[Any, list[int], list[int]]  # text, tokens of the prompt, tokens of the choice


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvalConfig,
    *,
    output_dir: Path | None = None,
    on_progress: Progress | None = None,
    at_most: int | None = None,
) -> Scores:
    """Score a model on a recipe's tasks, as it is: its dtype, its device, its quantizers on or off.

    Args:
        model: put in eval mode meanwhile; its state is not changed. Prompts longer than its context lose their
            beginning (counted in `TaskScore.num_truncated`).
        output_dir: where to keep the scores, lm-eval's own results (`lm_eval_results.json`) and its per-item samples
            (`samples/<leaf task>.jsonl`, without the prompts, which a hash stands for).
        on_progress: called after each request.
        at_most: of the items that the recipe scores so many per leaf task, spread evenly over them; None: all.
    Raises:
        InputError: a task that cannot be scored here and now.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    results: dict[str, Any] = {}
    scores: dict[str, TaskScore] = {}
    output_dir = output_dir if world().leads else None
    with quiet(), sandboxed_templates(), evaluation_mode(model):
        tasks = _build(config)
        lm = _language_model(model, tokenizer, config.batch_size, on_progress)
        if lm.prefix_token_id is None:
            raise InputError("the tokenizer names neither a BOS nor an EOS token, without which lm-eval cannot score")
        for task in tasks:
            outcome = _run(lm, task, _chosen(task, config.limit, at_most))
            samples = outcome.pop("samples")
            scores[task.name] = _task_score(task, samples, lm)
            if output_dir is not None:
                _write_samples(output_dir / SAMPLES, samples)
                for section, entries in outcome.items():  # results, groups, configs, ..., each keyed by task
                    results.setdefault(section, {}).update(entries)
    settings = _settings(config, model) | ({} if at_most is None else {"at_most": at_most})
    if output_dir is not None:
        results["config"] = {**settings, "sources": {task.name: task.source for task in tasks}}
        replace_file(output_dir / SCORES_OF_LM_EVAL, _to_json(results, indent=2))
        Scores(scores, settings).save(output_dir)
    return Scores(scores, settings)


def _build(config: EvalConfig) -> list[BuiltTask]:
    """All tasks before the first is scored, so that what cannot be scored shows at once."""
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    tasks = []
    for name, num_fewshot in config.tasks.items():
        with seeded():  # some tasks shuffle their choices
            tasks.append(build_task(name, num_fewshot, data_dir=data_dir, limit=config.limit))
    return tasks


class _Counting:
    """What is added to a model class of lm-eval's: counts of truncated requests and of tokens, progress, and a stop at the
    first NaN or Inf."""

    max_length: int

    def watch(self, on_progress: Progress | None) -> None:
        """To be called before the first task."""
        self.num_truncated = 0
        self.num_tokens: dict[tuple[str, str], int] = {}
        self._task = ""
        self._on_progress = on_progress

    def start(self, task: str) -> None:
        """Count truncated requests and tokens, and report progress, for this task from here on."""
        self._task, self.num_truncated, self.num_tokens = task, 0, {}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        base: Any = super()
        # lm-eval hands its cache every answer as soon as it is known.
        base.set_cache_hook(_AnswerHook(self._task, len(requests), self._on_progress))
        answers: list[tuple[float, bool]] = base.loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **options: Any) -> Any:
        if not all(context and choice for _, context, choice in requests):
            message = "it asks with a prompt or a choice that has no token in this tokenizer (empty, or blanks)"
            raise InputError(Problem(message, f"eval.tasks.{self._task}"))
        self.num_truncated += sum(len(context) + len(choice) > self.max_length + 1 for _, context, choice in requests)
        self.num_tokens |= {text: len(choice) for text, _, choice in requests}
        base: Any = super()
        answer = base._loglikelihood_tokens
        if world().size == 1:
            return answer(requests, **options)
        parts = _batches(requests, int(base.batch_size))
        answered = world().shared_out(parts, lambda part: answer([requests[i] for i in part], **options))
        order = [i for part in parts for i in part]
        by_request = dict(zip(order, chain.from_iterable(answered), strict=True))
        return [by_request[i] for i in range(len(requests))]


def _batches(requests: Sequence[_Request], size: int) -> list[list[int]]:
    """Indices of the requests of each batch that lm-eval would make of them: requests that differ in their last token alone
    need one forward, the longest come first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (_, context, choice) in enumerate(requests):
        groups.setdefault(tuple(context + choice[:-1]), []).append(i)

    def order(group: list[int]) -> tuple[int, tuple[int, ...]]:
        _, context, choice = max((requests[i] for i in group), key=lambda request: len(request[2]))
        return -len(context + choice), tuple(context + choice)

    ordered = sorted(groups.values(), key=order)
    return [[i for group in ordered[at : at + size] for i in group] for at in range(0, len(ordered), size)]


class _InMemoryLM(_Counting, HFLM):  # type: ignore[misc]
    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        with _never_tied(model):
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # it may be given a pad token
                backend="causal",
                batch_size=batch_size,
                softmax_dtype=SOFTMAX_DTYPE,
            )


def _language_model(model: Any, tokenizer: Any, batch_size: int, on_progress: Progress | None) -> Any:
    """The model as lm-eval asks it: in this process, or in an engine that has a class of lm-eval's own."""
    if isinstance(model, OwnModel):
        kind, options = model.lm_eval_model()
        lm: Any = type(f"_Counting{kind.__name__}", (_Counting, kind), {})(**options)
    else:
        lm = _InMemoryLM(model, tokenizer, batch_size)
    lm.watch(on_progress)
    return lm


class _AnswerHook:
    """Takes the place of lm-eval's response cache, which is keyed by the text alone and so blind to the weights."""

    def __init__(self, task: str, num_requests: int, on_progress: Progress | None) -> None:
        self.task = task
        self.num_requests = num_requests
        self.num_done = 0
        self.on_progress = on_progress

    def add_partial(self, _method: str, _request: tuple[str, str], answer: tuple[float, bool]) -> None:
        if not math.isfinite(answer[0]):
            raise NonFiniteError(f"the model's logits are NaN or infinite (scoring {self.task})")
        self.num_done = min(self.num_done + world().size, self.num_requests)
        if self.on_progress is not None:
            self.on_progress(self.task, self.num_done, self.num_requests)


@contextmanager
def _never_tied(model: PreTrainedModel) -> Iterator[None]:
    """Make `model.tie_weights()` do nothing: an attribute of the instance hides the method."""
    vars(model)["tie_weights"] = lambda: None
    try:
        yield
    finally:
        del vars(model)["tie_weights"]


def _chosen(task: BuiltTask, limit: int | None, at_most: int | None) -> dict[str, list[int]]:
    """Leaf task -> the documents to score, as indices in ascending order."""
    chosen = {}
    for name, leaf in task.lm_eval_tasks["tasks"].items():
        size = min(len(leaf.eval_docs), limit or len(leaf.eval_docs))
        wanted = size if at_most is None else min(size, at_most)
        chosen[name] = [size * i // wanted for i in range(wanted)]
    return chosen


def _run(lm: Any, task: BuiltTask, chosen: Mapping[str, list[int]]) -> dict[str, Any]:
    """lm-eval's results and samples of the chosen documents; no standard errors by bootstrap, `paired.py` does better."""
    for leaf in task.lm_eval_tasks["tasks"].values():
        leaf.set_fewshot_seed(FEWSHOT_SEED)
    lm.start(task.name)
    with seeded():
        outcome: dict[str, Any] = evaluate(lm, task.lm_eval_tasks, samples=chosen, bootstrap_iters=0, log_samples=True)
    return outcome


def _task_score(task: BuiltTask, samples: Mapping[str, list[dict[str, Any]]], lm: Any) -> TaskScore:
    ids, correct, gold, choices, num_tokens = [], [], [], [], 0
    for leaf_name, leaf_samples in samples.items():
        leaf = task.lm_eval_tasks["tasks"][leaf_name]
        for sample in leaf_samples:
            loglikelihoods = [response[0][0] for response in sample["resps"]]
            ids.append(_item_id(leaf_name, sample))
            correct.append(sample[task.metric])
            answer = max(_gold(leaf, sample), key=loglikelihoods.__getitem__)
            gold.append(loglikelihoods[answer])
            num_tokens += lm.num_tokens[sample["arguments"][answer]]
            choices.append(loglikelihoods)
    if not set(correct) <= {0, 1}:
        raise InputError(Problem(f"{task.metric} is not right or wrong per item", f"eval.tasks.{task.name}"))
    items = ItemScores(np.array(ids), np.array(correct, dtype=bool), np.array(gold), pad_choices(choices))
    others = _other_metrics(task, samples)
    return TaskScore(task.name, task.metric, task.num_fewshot, lm.num_truncated, num_tokens, items, others)


def _other_metrics(task: BuiltTask, samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Means over items of what lm-eval counts by item beside the task's metric, where all leaves of the task have it."""
    answered = [sample for leaf_samples in samples.values() for sample in leaf_samples]
    names = [set(sample["metrics"]) for sample in answered]
    shared = sorted(set.intersection(*names) - {task.metric}) if names else []
    columns = {name: [sample[name] for sample in answered] for name in shared}
    return {
        name: float(np.mean(values))
        for name, values in columns.items()
        if all(isinstance(value, int | float) for value in values)
    }


def _gold(leaf: Task, sample: Mapping[str, Any]) -> list[int]:
    """Indices of the right answers among the choices; one but for tasks with several right answers."""
    if leaf.OUTPUT_TYPE == "loglikelihood":
        return [0]
    target = leaf.doc_to_text(sample["doc"]) if leaf.multiple_input else sample["target"]
    if isinstance(target, str):
        target = leaf.doc_to_choice(sample["doc"]).index(target)
    return list(target) if isinstance(target, list) else [int(target)]


def _item_id(leaf: str, sample: Mapping[str, Any]) -> str:
    asked = "".join(sample[key] for key in ("doc_hash", "prompt_hash", "target_hash"))
    return f"{leaf}:{sample['doc_id']}:{hashlib.sha256(asked.encode()).hexdigest()[:16]}"


def _settings(config: EvalConfig, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "tasks": dict(config.tasks),
        "limit": config.limit,
        "batch_size": config.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "softmax_dtype": SOFTMAX_DTYPE,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


def _write_samples(folder: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leaf, leaf_samples in samples.items():
        lines = [
            _to_json({key: value for key, value in sample.items() if key != "arguments"}) for sample in leaf_samples
        ]
        replace_file(folder / f"{leaf}.jsonl", b"\n".join(lines) + b"\n")


def _to_json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False).encode()
