"""YAML with a memory: a tree of plain values in which every key knows the file and line, or the `--set`, it came from.

    Document.tree     nested dicts, lists and scalars
    Document.places   path of keys -> Place; () is the document itself

`merge` lays one document over another (extends, --set, arms) and carries the places along, so that a mistake found in
the result is reported where it was written.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from qatrun.errors import Problem

KeyPath = tuple[str | int, ...]

MAX_VALUES = 50_000
MAX_INTEGER = 2**63 - 1
STANDARD_TAG = "tag:yaml.org,2002:"
MERGE_TAG = f"{STANDARD_TAG}merge"
COLLECTION_TAGS = (f"{STANDARD_TAG}map", f"{STANDARD_TAG}seq")


@dataclass(frozen=True)
class Place:
    """Where a key stands.

    Attributes:
        where: `recipes/x.yaml:12`, `--set train.steps=5`, or "" for a recipe made in Python.
        order: (source, line), for sorting; the user's file is source 0, what it extends follows, then the `--set`s.
        key: the key in full as written there, such as `arms.hif8.qat.format`.
    """

    where: str
    order: tuple[int, int]
    key: str = ""

    def below(self, path: KeyPath) -> Place:
        """The same place, for a key below this one."""
        key = self.key
        for part in path:
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
        return replace(self, key=key)


@dataclass(frozen=True)
class Mistake:
    """One thing wrong, and the place of the key concerned."""

    place: Place
    message: str

    @property
    def problem(self) -> Problem:
        return Problem(self.message, self.place.key, self.place.where)


@dataclass
class Document:
    """A tree of plain values and the place of every key in it."""

    tree: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=lambda: {(): Place("", (0, 0))})

    def place(self, path: KeyPath) -> Place:
        """Where the key stands; for an absent key the line of the nearest mapping around it, with the key in full."""
        present = next(path[:length] for length in range(len(path), -1, -1) if path[:length] in self.places)
        return self.places[present].below(path[len(present) :])

    def places_below(self, path: KeyPath) -> dict[KeyPath, Place]:
        """The places of the keys below that one, by their path from there."""
        depth = len(path)
        below = {key[depth:]: place for key, place in self.places.items() if key[:depth] == path}
        return {(): self.place(path)} | below

    def only(self, keys: Collection[str]) -> Document:
        """The document with those of its top-level keys."""
        tree = {key: value for key, value in self.tree.items() if key in keys}
        return Document(tree, {path: place for path, place in self.places.items() if not path or path[0] in keys})


def deep_merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` laid over it: mappings merge key by key, anything else (lists and null too) replaces."""
    merged = dict(base)
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(below := merged.get(key), Mapping):
            value = deep_merge(below, value)
        merged[key] = value
    return merged


def _without(tree: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    key, *rest = path
    if rest and isinstance(tree.get(key), Mapping):
        return {**tree, key: _without(tree[key], tuple(rest))}
    return {name: value for name, value in tree.items() if name != key or rest}


def merge(base: Document, overrides: Document) -> Document:
    """`overrides` laid over `base`. A mapping that both have keeps the place it has in `base`."""
    written = {
        path: place for path, place in overrides.places.items() if not _is_mapping_in_both(path, base, overrides)
    }
    replaced = {path for path in written if not isinstance(_value(overrides.tree, path), Mapping)}
    kept = {
        path: place for path, place in base.places.items() if not any(prefix in replaced for prefix in _prefixes(path))
    }
    return Document(deep_merge(base.tree, overrides.tree), kept | written)


def _is_mapping_in_both(path: KeyPath, base: Document, overrides: Document) -> bool:
    """Merged key by key: a mapping in a list is not, for the list is replaced."""
    below_mappings = path in base.places and not any(isinstance(part, int) for part in path)
    return below_mappings and all(isinstance(_value(doc.tree, path), Mapping) for doc in (base, overrides))


def _value(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _prefixes(path: KeyPath) -> Iterator[KeyPath]:
    return (path[:length] for length in range(len(path) + 1))


def read_yaml(text: str, shown: str, source: int) -> tuple[Document, list[Mistake]]:
    """Parse a recipe file.

    Args:
        text: the file's content.
        shown: its path as messages show it.
        source: its position in the order of messages.
    Returns:
        The document, and the keys that are in it twice.
    Raises:
        InvalidYamlError: not YAML, or not a mapping.
    """
    reader = _Reader(lambda line: Place(f"{shown}:{line}", (source, line)))
    tree = reader.read_text(text)
    places = {(): reader.place((), 1)} | reader.places
    if not isinstance(tree, dict | None):
        raise InvalidYamlError(Mistake(places[()], "a recipe must be a mapping of keys to values"))
    return Document(tree or {}, places), reader.mistakes


def with_override(document: Document, text: str, source: int) -> tuple[Document, list[Mistake]]:
    """The document with the value of one key replaced, as `--set key.path=value` says; the value is YAML.

    Args:
        source: its position in the order of messages.
    Returns:
        The document, and the keys that are in the value twice.
    Raises:
        InvalidYamlError: not of that form, or the value is not YAML.
    """
    place = Place(f"--set {text}", (source, 0))
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise InvalidYamlError(Mistake(place, "must be key.path=value"))
    reader = _Reader(lambda _line: place)
    tree: Any = reader.read_text(value, path)
    for part in reversed(path):
        tree = {part: tree}
    places = {prefix: reader.place(prefix, 0) for prefix in _prefixes(path)} | reader.places
    kept = {other: place for other, place in document.places.items() if other[: len(path)] != path}
    return merge(Document(_without(document.tree, path), kept), Document(tree, places)), reader.mistakes


class InvalidYamlError(Exception):
    """Text that holds no document."""

    def __init__(self, mistake: Mistake) -> None:
        super().__init__(mistake.message)
        self.mistake = mistake


class _Reader:
    """Turns YAML nodes into plain values, noting places and repeated keys on the way."""

    def __init__(self, place_of_line: Callable[[int], Place]) -> None:
        self.place_of_line = place_of_line
        self.places: dict[KeyPath, Place] = {}
        self.mistakes: list[Mistake] = []
        self.num_values = 0
        self.yaml = YAML(typ="safe", pure=True)

    def read_text(self, text: str, path: KeyPath = ()) -> Any:
        try:
            node = self.yaml.compose(text)
            return None if node is None else self._read(node, path, _line(node))
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise self._invalid(path, line, error.problem or error.context) from None
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise self._invalid(path, line, f"{error.reason} (#x{error.character:02x})") from None
        except RecursionError:
            raise self._invalid(path, 1, "nested without end (an alias inside its own anchor?)") from None

    def place(self, path: KeyPath, line: int) -> Place:
        return self.place_of_line(line).below(path)

    def _invalid(self, path: KeyPath, line: int, problem: str | None) -> InvalidYamlError:
        return InvalidYamlError(Mistake(self.place(path, line), f"not valid YAML: {problem}"))

    def _read(self, node: Node, path: KeyPath, line: int) -> Any:
        self._count(path, line)
        self.places[path] = self.place(path, line)
        if isinstance(node, ScalarNode):
            return self._read_scalar(node, path, line)
        if node.tag not in COLLECTION_TAGS:
            raise self._invalid(path, line, f"no recipe takes the tag {_shown_tag(node)}")
        if isinstance(node, MappingNode):
            return self._read_mapping(node, path)
        return [self._read(item, (*path, i), _line(item)) for i, item in enumerate(node.value)]

    def _read_scalar(self, node: ScalarNode, path: KeyPath, line: int) -> Any:
        try:
            value = self.yaml.constructor.construct_object(node)
        except MarkedYAMLError:
            raise self._invalid(path, line, f"no recipe takes the tag {_shown_tag(node)}") from None
        except Exception:  # ruamel.yaml lets out whatever its conversion of a tagged value raises
            raise self._invalid(path, line, f"'{node.value:.40}' is no {_shown_tag(node)}") from None
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise self._invalid(path, line, f"a whole number of {len(node.value)} digits")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise self._invalid(path, line, "half of a surrogate pair, which is no character")
        return value

    def _read_mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node, is_merged in self._pairs(node, path):
            key, line = str(key_node.value), _line(key_node)
            if key not in values:
                lines[key] = line
                values[key] = self._read(value_node, (*path, key), line)
            elif not is_merged:
                message = f"duplicate key (first on line {lines[key]})"
                self.mistakes.append(Mistake(self.place((*path, key), line), message))
        return values

    def _pairs(self, node: MappingNode, path: KeyPath) -> Iterator[tuple[ScalarNode, Node, bool]]:
        """Keys and values, a mapping's own first, then those that `<<` merges into it: the first one of a key holds."""
        merged: list[Node] = []
        for key_node, value_node in node.value:
            self._count(path, _line(key_node))
            if not isinstance(key_node, ScalarNode):
                raise self._invalid(path, _line(key_node), "a key must be a word or a number")
            if key_node.tag != MERGE_TAG:
                yield key_node, value_node, False
            else:
                merged += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
        for other in merged:
            if not isinstance(other, MappingNode):
                raise self._invalid((*path, "<<"), _line(other), "`<<` merges a mapping, or a list of them")
            yield from ((key, value, True) for key, value, _ in self._pairs(other, path))

    def _count(self, path: KeyPath, line: int) -> None:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise self._invalid(path, line, f"more than {MAX_VALUES:,} values (aliases of aliases?)")


def _shown_tag(node: Node) -> str:
    """`!!int`, as it is written."""
    return str(node.tag).replace(STANDARD_TAG, "!!")


def _line(node: Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def as_yaml(tree: Any) -> str:
    """Plain data as a file has it, keys in their order."""
    written = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel.yaml annotates it as None
    yaml.dump(tree, written)
    return written.getvalue()
