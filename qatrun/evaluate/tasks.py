"""From the tasks of a recipe to lm-eval tasks.

Prompts, splits and metrics are lm-eval's; only where the rows are read from is ours (`sources.py`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks.manager import TaskDict

from qatrun.errors import InputError, Problem
from qatrun.evaluate.plan import Rows, check_fewshot, plan_tasks
from qatrun.evaluate.registry import RegisteredTask, find_task
from qatrun.evaluate.sources import BuiltinSource, DatasetsSource, FolderSource, TaskError, find_source
from qatrun.evaluate.templates import sandboxed_templates, template_error


@dataclass(frozen=True)
class BuiltTask:
    """A task ready to be scored.

    Attributes:
        lm_eval_tasks: lm-eval's leaf tasks by name, and its groups for its own aggregate results.
    """

    name: str
    num_fewshot: int
    metric: str
    source: str
    lm_eval_tasks: TaskDict


def check_available(tasks: Mapping[str, int], *, data_dir: Path | None = None) -> list[Problem]:
    """One problem for each task that cannot be scored here and now, for the reasons that `build_task` lists."""
    plans = plan_tasks(tasks, data_dir=data_dir)
    return [Problem(plan.missing, _key(plan.name)) for plan in plans if plan.missing is not None]


def build_task(name: str, num_fewshot: int, *, data_dir: Path | None = None, limit: int | None = None) -> BuiltTask:
    """Load a task's data and make it ready for lm-eval.

    Raises:
        InputError: unknown, not comparable item by item, no data, or few-shot examples that are also scored.
    """
    try:
        registered = find_task(name)
        loaded = _loaded(registered, {"class": _SourcedTask, "data_dir": data_dir, "num_fewshot": num_fewshot}, limit)
        for leaf in registered.leaves:
            check_fewshot(leaf, num_fewshot, functools.partial(_rows_of, loaded["tasks"][leaf.name]))
        return BuiltTask(
            name=name,
            num_fewshot=num_fewshot,
            metric=registered.metric,
            source=find_source(registered.leaves[0].config, data_dir).name,
            lm_eval_tasks=loaded,
        )
    except TaskError as error:
        raise InputError(Problem(str(error), _key(name))) from error


def _loaded(registered: RegisteredTask, overrides: Mapping[str, Any], limit: int | None) -> TaskDict:
    """lm-eval's tasks; those of a user's file are asked all their questions once, so that a faulty one shows early.

    Raises:
        TaskError: lm-eval cannot make them, or a question of theirs.
    """
    try:
        with sandboxed_templates():
            loaded = registered.load(overrides)
            if registered.file is not None:
                for leaf in loaded["tasks"].values():
                    for number, doc in enumerate(itertools.islice(leaf.eval_docs, limit)):
                        _check_question(leaf, number, doc)
    except (TaskError, OSError):
        raise
    except Exception as error:  # whatever a file's templates, functions or rows lead to in lm-eval
        raise template_error(f"lm-eval cannot ask it: {type(error).__name__}", error) from error
    return loaded


def _check_question(leaf: Task, number: int, doc: Mapping[str, Any]) -> None:
    asked, answer = leaf.doc_to_text(doc), leaf.doc_to_target(doc)
    if leaf.OUTPUT_TYPE != "multiple_choice" or isinstance(asked, int):
        return
    choices = leaf.doc_to_choice(doc)
    if not choices or not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise TaskError(f"'{leaf.task_name}': doc_to_choice gives no list of texts for item {number}: {choices!r:.60}")
    for right in answer if isinstance(answer, list) else [answer]:
        known = right in choices if isinstance(right, str) else right in range(len(choices))
        if not known:
            raise TaskError(f"'{leaf.task_name}': the answer to item {number} ({right!r:.40}) is none of its choices")


class _SourcedTask(ConfigurableTask):  # type: ignore[misc]
    """lm-eval's task, its rows read from a `Source`, and its scored documents made once instead of at each access."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._data_dir: Path | None = config["data_dir"]
        super().__init__(config={key: value for key, value in config.items() if key not in {"class", "data_dir"}})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        source = find_source(vars(self.config), self._data_dir)
        if isinstance(source, BuiltinSource):
            self.dataset = {"test": datasets.Dataset.from_list(source.rows("test"))}
        elif isinstance(source, FolderSource):
            self.dataset = {split: datasets.Dataset(source.table(split)) for split in source.files}
        elif isinstance(source, DatasetsSource):
            self.DATASET_PATH = source.dataset_path
            super().download(dataset_kwargs)

    @functools.cached_property
    def eval_docs(self) -> Any:
        return super().eval_docs


def _rows_of(task: Task, split: str) -> Rows:
    return list(task.dataset[split])


def _key(task: str) -> str:
    return f"eval.tasks.{task}"
