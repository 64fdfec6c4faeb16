"""Names of tasks -> their lm-eval configurations, without loading any data.

A task is a name of lm-eval's own (task, group or tag), a path to a task's YAML file, or one of `qatrun.demo`'s.
Indexing all 14,000 files of lm-eval takes seconds, so the folder that a name points to is tried first: for
`arc_challenge` `tasks/arc_challenge`, then `tasks/arc`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks.manager import TaskDict

from qatrun import demo
from qatrun.evaluate.leaves import LeafTask, demo_leaf, metric_of
from qatrun.evaluate.sources import TaskError
from qatrun.evaluate.task_file import STOCK_FOLDER, check_leaf, check_types, is_plain_name, read_task_file
from qatrun.evaluate.trust import task_code_is_trusted
from qatrun.text import suggestion

_GROUP_KEYS = frozenset({"group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata"})
_WRAPPER = "qatrun"


@dataclass(frozen=True)
class RegisteredTask:
    """A name and the index that knows it and all its members.

    Attributes:
        members: what a group that stands for it would list, each a mapping with the one key `task` or `group`.
        file: the user's file that it is from; None for lm-eval's own and the demo's.
    """

    manager: TaskManager
    members: tuple[Mapping[str, str], ...]
    leaves: tuple[LeafTask, ...]
    file: Path | None

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


def find_task(name: str) -> RegisteredTask:
    """Look a task up.

    Raises:
        TaskError: unknown (the message names the nearest), not scored in a way that can be compared, or a file with code
            that is not trusted.
    """
    file = Path(name).expanduser() if Path(name).suffix in {".yaml", ".yml"} else None
    return _find_task(name, file, Path.cwd() if file is not None else None, task_code_is_trusted())


@functools.cache
def _find_task(name: str, file: Path | None, _folder: Path | None, _trusted: bool) -> RegisteredTask:
    missing = KeyError(name)
    for manager, key in _places(name, file):
        if key in manager.task_index:
            try:
                return _register(manager, key, file)
            except KeyError as error:  # a member lives in a folder that this index did not read
                missing = error
            except RecursionError:
                raise TaskError(f"{file}: its groups hold each other") from None
    if file is not None:
        raise TaskError(f"{file}: no task {missing} in it or among lm-eval's")
    own = next((file.name for file in Path().glob("*.yaml") if file.stem.replace("-", "_") == name), None)
    if own is not None:
        raise TaskError(f"unknown task '{name}' (did you mean the file '{own}'?)")
    known = [*demo.TASKS, *_stock_index().task_index]
    raise TaskError(f"unknown task '{name}'{suggestion(name, known, otherwise='')}")


def _places(name: str, file: Path | None) -> Iterator[tuple[TaskManager, str]]:
    if name in demo.TASKS:
        yield _index_with(dict(demo_leaf(name).config)), name
    elif file is not None:
        if not file.is_file():
            raise TaskError(f"no such file: {name}")
        config = read_task_file(file)
        key = config.get("group") or config.get("task")
        if not isinstance(key, str):
            raise TaskError(f"{file}: task: missing, or no text: a task file names its task or group")
        # As it was just read: lm-eval would read the file anew whenever it makes the task, and run its functions.
        path = file if task_code_is_trusted() else None
        yield _index_with(config, path), key
        yield _index_with(config, path, include_defaults=True), key
    elif is_plain_name(name):
        for folder in _likely_folders(name):
            yield TaskManager(include_defaults=False, include_path=str(folder)), name
        yield _stock_index(), name


def _likely_folders(name: str) -> Iterator[Path]:
    words = name.split("_")
    for end in range(len(words), 0, -1):
        folder = STOCK_FOLDER / "_".join(words[:end])
        if folder.is_dir():
            yield folder


@functools.cache
def _stock_index() -> TaskManager:
    return TaskManager()


def _index_with(config: dict[str, Any], path: Path | None = None, *, include_defaults: bool = False) -> TaskManager:
    manager = TaskManager(include_defaults=include_defaults)
    manager.task_index.pop(config.get("group") or config.get("task"), None)  # the user's goes before lm-eval's
    TaskIndex.process_cfg(config, path, manager.task_index)
    return manager


def _register(manager: TaskManager, key: str, file: Path | None) -> RegisteredTask:
    """Raises KeyError where the index lacks a member."""
    entry = manager.task_index[key]
    names = sorted(entry.tags) if entry.kind.name == "TAG" else [key]
    kind = "group" if entry.kind.name == "GROUP" else "task"
    leaves = tuple(
        LeafTask(config["task"], config) for name in names for config in _expand(manager.task_index, name, {})
    )
    if not leaves:
        raise TaskError(f"'{key}' is a group of no tasks")
    for leaf in leaves:
        if file is not None:
            check_types(leaf, file)  # before anything asks what the values mean
        leaf.check_comparable()
        if file is not None:
            check_leaf(leaf, file)
    return RegisteredTask(manager, tuple({kind: name} for name in names), leaves, file)


def _expand(
    index: Mapping[str, Any], member: str | Mapping[str, Any], inherited: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Configurations of the leaves below a member of a group; a member's own overrides win over its group's."""
    if isinstance(member, str):
        member = {"task": member}
    name = member.get("group") or member.get("task") if isinstance(member, Mapping) else None
    if not isinstance(name, str):
        raise TaskError(f"a group lists names, or mappings with one, not {member!r:.60}")
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
