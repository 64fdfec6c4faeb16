"""From the tasks of a recipe to lm-eval tasks, and to a plan that says what they would score.

Prompts, splits and metrics are lm-eval's; only where the rows are read from is ours (`sources.py`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks.manager import TaskDict

from qatrun.errors import InputError, Problem
from qatrun.evaluate.registry import LeafTask, find_task
from qatrun.evaluate.sources import (
    BuiltinSource,
    DatasetsSource,
    FolderSource,
    Source,
    TaskError,
    find_source,
    local_folder,
    num_shared_rows,
)

# Official splits may share a stray row, and published scores live with it; a few-shot split made of scored items is
# another matter.
STRAY_SHARE = 0.01

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TaskPlan:
    """What a task would score.

    Attributes:
        metric: lm-eval's name of what counts as right.
        num_items: within the limit; None where only a download would tell.
        source: where the questions come from; for a group, of its first leaf.
        missing: why it cannot be scored here and now; None where it can, and then the other fields hold.
    """

    name: str
    num_fewshot: int
    metric: str
    num_items: int | None
    source: str
    missing: str | None


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


def plan_tasks(tasks: Mapping[str, int], *, data_dir: Path | None = None, limit: int | None = None) -> list[TaskPlan]:
    """Say what each task would score; loads no model and downloads no data.

    Args:
        tasks: task -> number of few-shot examples.
        data_dir: folder laid out like the hub (`org/name`), tried before the hub.
        limit: items per leaf task; None for all.
    """
    return [_plan(name, num_fewshot, data_dir, limit) for name, num_fewshot in tasks.items()]


def check_available(tasks: Mapping[str, int], *, data_dir: Path | None = None) -> list[Problem]:
    """One problem for each task that cannot be scored here and now, for the reasons that `build_task` lists."""
    plans = plan_tasks(tasks, data_dir=data_dir)
    return [Problem(plan.missing, _key(plan.name)) for plan in plans if plan.missing is not None]


def build_task(name: str, num_fewshot: int, *, data_dir: Path | None = None) -> BuiltTask:
    """Load a task's data and make it ready for lm-eval.

    Raises:
        InputError: unknown, not comparable item by item, no data, or few-shot examples that are also scored.
    """
    try:
        registered = find_task(name)
        loaded = registered.load({"class": _SourcedTask, "data_dir": data_dir, "num_fewshot": num_fewshot})
        for leaf in registered.leaves:
            _check_fewshot(leaf, num_fewshot, functools.partial(_rows_of, loaded["tasks"][leaf.name]))
        return BuiltTask(
            name=name,
            num_fewshot=num_fewshot,
            metric=registered.metric,
            source=find_source(registered.leaves[0].config, data_dir).name,
            lm_eval_tasks=loaded,
        )
    except TaskError as error:
        raise InputError(Problem(str(error), _key(name))) from error


def write_task_files(folder: Path, tasks: Mapping[str, int], data_dir: Path) -> list[str]:
    """Write a file `<task>_local.yaml` per task, so that `lm_eval --include_path <folder>` scores it from `data_dir`.

    Returns:
        Names for lm-eval's `--tasks`.
    Raises:
        InputError: a task's data is not below `data_dir`, or lies in more than one data set there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, num_fewshot in tasks.items():
        registered = find_task(name)
        paths = {local_folder(leaf.config["dataset_path"], data_dir) for leaf in registered.leaves}
        path = paths.pop()
        if paths or path is None:
            raise InputError(Problem(f"its data is not one folder below {data_dir}", _key(name)))
        overrides = {"dataset_path": str(path), "num_fewshot": num_fewshot}
        group = {"group": f"{name}_local", "task": [{**member, **overrides} for member in registered.members]}
        # JSON is YAML.
        (folder / f"{name}_local.yaml").write_text(json.dumps(group, indent=2), encoding="utf-8")
    return [f"{name}_local" for name in tasks]


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


def _plan(name: str, num_fewshot: int, data_dir: Path | None, limit: int | None) -> TaskPlan:
    try:
        registered = find_task(name)
        sources = [find_source(leaf.config, data_dir) for leaf in registered.leaves]
        for leaf, source in zip(registered.leaves, sources, strict=True):
            _check_fewshot(leaf, num_fewshot, source.rows)
        sizes = [_num_items(leaf, source, limit) for leaf, source in zip(registered.leaves, sources, strict=True)]
        known = [size for size in sizes if size is not None]
        num_items = sum(known) if len(known) == len(sizes) else None
        return TaskPlan(name, num_fewshot, registered.metric, num_items, sources[0].name, missing=None)
    except TaskError as error:
        return TaskPlan(name, num_fewshot, metric="", num_items=None, source="", missing=str(error))


def _num_items(leaf: LeafTask, source: Source, limit: int | None) -> int | None:
    size = source.num_rows(leaf.scored_split)
    return size if size is None or limit is None else min(size, limit)


def _rows_of(task: Task, split: str) -> Rows:
    return list(task.dataset[split])


def _check_fewshot(leaf: LeafTask, num_fewshot: int, rows: Callable[[str], Rows | None]) -> None:
    """Refuse few-shot examples that are also scored: they show the model answers that it is then asked for."""
    split = leaf.fewshot_split
    if num_fewshot == 0 or split is None:
        return
    pool, scored = rows(split), rows(leaf.scored_split)
    if pool is None or scored is None:
        return
    num_shared = num_shared_rows(pool, scored)
    if num_shared > STRAY_SHARE * len(pool):
        raise TaskError(
            f"{num_shared} of the {len(pool)} few-shot examples in split '{split}' are also scored items of "
            f"'{leaf.name}'; score it with 0 few-shot examples, or from data with a split of its own for them"
        )
    if num_fewshot > len(pool):
        raise TaskError(f"{num_fewshot} few-shot examples wanted, '{leaf.name}' has {len(pool)} in split '{split}'")


def _key(task: str) -> str:
    return f"eval.tasks.{task}"
