"""Names of tasks -> their lm-eval configurations, without loading any data.

A task is a name of lm-eval's own (task, group or tag), a path to a task's YAML file, or one of `qatrun.demo`'s.
Indexing all 14,000 files of lm-eval takes seconds, so the folder that a name points to is tried first: for
`arc_challenge` `tasks/arc_challenge`, then `tasks/arc`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict

from qatrun import demo
from qatrun.evaluate.leaves import LeafTask, demo_leaf, metric_of
from qatrun.evaluate.sources import TaskError

STOCK_FOLDER = Path(lm_eval.tasks.__file__).parent
_GROUP_KEYS = frozenset({"group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata"})
_WRAPPER = "qatrun"


@dataclass(frozen=True)
class RegisteredTask:
    """A name and the index that knows it and all its members.

    Attributes:
        members: what a group that stands for it would list, each a mapping with the one key `task` or `group`.
    """

    manager: TaskManager
    members: tuple[Mapping[str, str], ...]
    leaves: tuple[LeafTask, ...]

    @property
    def metric(self) -> str:
        return metric_of(self.leaves)

    def load(self, overrides: Mapping[str, Any]) -> TaskDict:
        """lm-eval's tasks and groups for it, the overrides applied to every leaf."""
        wrapper = {"group": _WRAPPER, "task": [{**member, **overrides} for member in self.members]}
        self.manager.task_index.pop(_WRAPPER, None)
        TaskIndex.process_cfg(wrapper, None, self.manager.task_index)
        loaded = self.manager.load(_WRAPPER)
        del loaded["groups"][_WRAPPER], loaded["group_map"][_WRAPPER]
        return loaded


@functools.cache
def find_task(name: str) -> RegisteredTask:
    """Look a task up.

    Raises:
        TaskError: unknown (the message names the nearest), or not scored in a way that can be compared.
    """
    for manager, key in _places(name):
        if key in manager.task_index:
            try:
                return _register(manager, key)
            except KeyError:  # a member lives in a folder that this index did not read
                continue
    known = [*demo.TASKS, *_stock_index().task_index]
    close = get_close_matches(name, known, n=1)
    raise TaskError(f"unknown task '{name}'" + (f" (did you mean '{close[0]}'?)" if close else ""))


def _places(name: str) -> Iterator[tuple[TaskManager, str]]:
    if name in demo.TASKS:
        yield _index_with(dict(demo_leaf(name).config)), name
    elif Path(name).suffix in {".yaml", ".yml"}:
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise TaskError(f"no such file: {name}")
        config = load_yaml(path, resolve_func=False)
        key = str(config.get("group") or config.get("task"))
        yield _index_with(config, path), key
        yield _index_with(config, path, include_defaults=True), key
    else:
        yield from ((_folder_index(folder), name) for folder in _likely_folders(name))
        yield _stock_index(), name


def _likely_folders(name: str) -> Iterator[Path]:
    words = name.split("_")
    for end in range(len(words), 0, -1):
        folder = STOCK_FOLDER / "_".join(words[:end])
        if folder.is_dir():
            yield folder


def _folder_index(folder: Path) -> TaskManager:
    return TaskManager(include_defaults=False, include_path=str(folder))


@functools.cache
def _stock_index() -> TaskManager:
    return TaskManager()


def _index_with(config: dict[str, Any], path: Path | None = None, *, include_defaults: bool = False) -> TaskManager:
    manager = TaskManager(include_defaults=include_defaults)
    TaskIndex.process_cfg(config, path, manager.task_index)
    return manager


def _register(manager: TaskManager, key: str) -> RegisteredTask:
    """Raises KeyError where the index lacks a member."""
    entry = manager.task_index[key]
    names = sorted(entry.tags) if entry.kind.name == "TAG" else [key]
    kind = "group" if entry.kind.name == "GROUP" else "task"
    leaves = tuple(
        LeafTask(config["task"], config) for name in names for config in _expand(manager.task_index, name, {})
    )
    for leaf in leaves:
        leaf.check_comparable()
    return RegisteredTask(manager, tuple({kind: name} for name in names), leaves)


def _expand(
    index: Mapping[str, Any], member: str | Mapping[str, Any], inherited: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Configurations of the leaves below a member of a group; a member's own overrides win over its group's."""
    if isinstance(member, str):
        member = {"task": member}
    name = member.get("group", member["task"])
    overrides = {**inherited, **{key: value for key, value in member.items() if key not in _GROUP_KEYS}}
    entry = index.get(name)
    if entry is not None and entry.kind.name == "TAG":
        for tagged in sorted(entry.tags):
            yield from _expand(index, tagged, overrides)
    elif entry is not None and entry.kind.name != "GROUP":
        yield {**entry.cfg, **overrides}
    else:
        group = entry.cfg if entry is not None else member
        if not isinstance(group["task"], list):
            raise KeyError(name)
        shared = {key: value for key, value in group.items() if key not in _GROUP_KEYS}
        for child in group["task"]:
            yield from _expand(index, child, {**shared, **overrides})
