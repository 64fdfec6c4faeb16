"""A task file of the user's: read, checked, and searched for code, before lm-eval sees it and without running any of it.

Code is a Python function (`!function`), a metric that is not lm-eval's own (a script, of a folder or the hub), a prompt
of another package, and what a template reaches beyond Jinja's sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jinja2
import lm_eval.api.metrics  # it fills the registry of metrics
import lm_eval.tasks
import yaml
from jinja2 import nodes
from lm_eval.api.registry import metric_registry
from lm_eval.config.task import FewshotConfig, TaskConfig
from lm_eval.tasks._yaml_loader import load_yaml
from pydantic import BaseModel, ValidationError

from qatrun.evaluate.leaves import LeafTask
from qatrun.evaluate.sources import TaskError
from qatrun.evaluate.templates import SANDBOX, is_template
from qatrun.evaluate.trust import OPTION, task_code_is_trusted
from qatrun.text import suggestion

STOCK_FOLDER = Path(lm_eval.tasks.__file__).parent.resolve()
MAX_NODES = 100_000  # of a file with its aliases written out
_NAME_BYTES = 200  # a file's name may have 255, and ours begins with the task's
_GROUP_KEYS = frozenset({"group", "group_alias", "aggregate_metric_list", "include", "task_list"})


@dataclass(frozen=True)
class Place:
    """A text in a task file.

    Attributes:
        key: of the mapping that holds it.
        tag: YAML's, such as `!function`.
    """

    file: Path
    line: int
    key: str
    tag: str
    value: str


def read_task_file(path: Path) -> dict[str, Any]:
    """A task file's keys, those of its includes among them; functions are left as they are written.

    Raises:
        TaskError: it is no task file, a name in it is none, or it holds code that is not trusted.
    """
    texts = list(_texts(path, []))
    if not task_code_is_trusted():
        for text in texts:
            _refuse_code(text)
    try:
        config: dict[str, Any] = load_yaml(path, resolve_func=False)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise TaskError(_one_line(error)) from error
    for key in ("task", "group"):
        if isinstance(name := config.get(key), str) and not is_plain_name(name):
            line = next((text.line for text in texts if text.key == key and text.value == name), 1)
            raise TaskError(f"{path}:{line}: {key}: {name!r} is no plain name (no separators, no leading dot)")
    return config


def check_types(leaf: LeafTask, file: Path) -> None:
    """Refuse a task in which a key holds another kind of value than it should."""
    try:
        _Keys.model_validate(dict(leaf.config))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise TaskError(f"{file}: {key}: {first['msg'].lower()} (got {first['input']!r:.60})") from error


def check_leaf(leaf: LeafTask, file: Path) -> None:
    """Refuse a task that lm-eval could not make, or whose metrics are code that is not trusted."""
    config = leaf.config
    _refuse_unknown(config, TaskConfig, _GROUP_KEYS, file)
    _refuse_unknown(config.get("fewshot_config") or {}, FewshotConfig, frozenset(), file)
    if not (config.get("test_split") or config.get("validation_split")):
        raise TaskError(f"{file}: test_split: missing (or validation_split): nothing to score")
    if not task_code_is_trusted():
        for entry in config.get("metric_list") or ():
            if entry.get("hf_evaluate") or entry["metric"] not in metric_registry:
                _refuse(f"{file}: metric_list: {entry['metric']!r} is not a metric of lm-eval's, it is a script")


def is_plain_name(name: str) -> bool:
    """Whether it can be a file's name wherever one is made of it: it leads into no other folder."""
    return (
        name.isprintable()
        and not set(name) & set("/\\:")
        and not name.startswith(".")
        and 0 < len(name.encode()) <= _NAME_BYTES
    )


class _Metric(BaseModel):
    metric: str


class _Keys(BaseModel):
    """The keys that are looked at before lm-eval makes the task."""

    task: str
    output_type: str = "generate_until"
    dataset_path: str | None = None
    dataset_name: str | None = None
    dataset_kwargs: dict[str, Any] | None = None
    test_split: str | None = None
    validation_split: str | None = None
    training_split: str | None = None
    fewshot_split: str | None = None
    fewshot_config: dict[str, Any] | None = None
    metric_list: list[_Metric] | None = None


def _texts(path: Path, including: list[Path]) -> Iterator[Place]:
    """Every text of a file and of the files it includes; those that ship with lm-eval are not looked into."""
    if path.resolve().is_relative_to(STOCK_FOLDER):
        return
    if path.resolve() in including:
        raise TaskError(f"{path}: include: it includes itself")
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise TaskError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise TaskError(f"{path}: {_one_line(error)}") from error
    if not isinstance(root, yaml.MappingNode):
        raise TaskError(f"{path}: it is no task: a task file is a mapping of keys")
    if _size(root, {}) > MAX_NODES:
        raise TaskError(f"{path}: its aliases stand for more than {MAX_NODES:,} values")
    for text in _texts_below(root, path, "", set()):
        yield text
        if text.key == "include":
            yield from _texts(path.parent / text.value, [*including, path.resolve()])


def _texts_below(node: yaml.Node, path: Path, key: str, seen: set[int]) -> Iterator[Place]:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _texts_below(name, path, key, seen)
            yield from _texts_below(value, path, str(name.value), seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _texts_below(value, path, key, seen)
    else:
        yield Place(path, node.start_mark.line + 1, key, str(node.tag), node.value)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes below, an alias counted wherever it stands: merge keys are written out one by one."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # a node that holds itself
        children = [child for pair in node.value for child in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]


def _refuse_code(text: Place) -> None:
    where = f"{text.file}:{text.line}: {text.key}"
    if text.tag == "!function":
        _refuse(f"{where} is code ({text.tag} {text.value})")
    if text.key == "use_prompt":
        _refuse(f"{where} is a prompt of another package")
    if text.key == "cache_dir":
        raise TaskError(f"{where}: a task does not say where data is kept; set HF_HOME")
    if is_template(text.value):
        try:
            tree = SANDBOX.parse(text.value)
        except jinja2.TemplateSyntaxError as error:
            raise TaskError(f"{where}: {error.message}") from error
        if (private := next(_private_names(tree), None)) is not None:
            _refuse(f"{where} is code (its template reaches for '{private}')")


def _private_names(tree: nodes.Template) -> Iterator[str]:
    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Filter)):
        name: Any = None
        if isinstance(node, nodes.Getattr):
            name = node.attr
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            name = node.arg.value
        elif isinstance(node, nodes.Filter) and node.name == "attr" and isinstance(node.args[0], nodes.Const):
            name = node.args[0].value
        if isinstance(name, str) and name.startswith("_"):
            yield name


def _refuse(what: str) -> None:
    raise TaskError(f"{what}: read it, then allow it with {OPTION}")


def _refuse_unknown(config: Mapping[str, Any], known: type, more: frozenset[str], file: Path) -> None:
    names = {field.name for field in fields(known)} | more
    for key in config:
        if key not in names:
            raise TaskError(f"{file}: {key}: unknown key{suggestion(str(key), names, otherwise='')}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
