"""What the schema finds wrong in a document, as mistakes with a place, a reason and the nearest valid choice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qatrun.formats import nearest
from qatrun.recipe.document import Document, KeyPath, Mistake
from qatrun.recipe.qat import Section
from qatrun.recipe.schema import Recipe
from qatrun.text import number, shown, suggestion

SectionT = TypeVar("SectionT", bound=Section)


def validate(model: type[SectionT], document: Document) -> tuple[SectionT, list[Mistake], frozenset[KeyPath]]:
    """Hold a document against the schema.

    Returns:
        The section; the mistakes; the paths they concern. What is wrong is replaced in the section by a default or an
        example, so that the rules between the other keys can still be checked.
    """
    tree = document.tree
    mistakes: list[Mistake] = []
    bad_paths: frozenset[KeyPath] = frozenset()
    while True:
        try:
            return model.model_validate(tree), mistakes, bad_paths
        except ValidationError as error:
            # A default made from other keys waits for those to be mended.
            errors = [details for details in error.errors() if details["type"] != "default_factory_not_called"]
            if not bad_paths:
                mistakes = [Mistake(document.place(_path(details)), _message(model, details)) for details in errors]
                bad_paths = frozenset(_path(details) for details in errors)
            tree = copy.deepcopy(tree)
            for details in errors:
                _repair(model, tree, _path(details))


def unknown_key(key: str, choices: Collection[str]) -> str:
    """The message for a key that a mapping does not take."""
    elsewhere = [path for path in _all_keys(Recipe) if path.split(".")[-1] == key]
    if elsewhere:
        return f"unknown key here (did you mean '{elsewhere[0]}'?)"
    return f"unknown key{suggestion(key, choices)}"


def nested_section(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds; None for a plain value."""
    members = (annotation, *get_args(annotation))
    return next((member for member in members if isinstance(member, type) and issubclass(member, Section)), None)


def literal_choices(annotation: Any) -> tuple[str, ...]:
    """The choices of a Literal field, nullable or not; empty for other types."""
    members = (annotation, *get_args(annotation))
    return next((get_args(member) for member in members if get_origin(member) is Literal), ())


def _path(details: ErrorDetails) -> KeyPath:
    # An error in the key of a mapping is located one level below it, at "[key]".
    return details["loc"][:-1] if details["loc"][-1] == "[key]" else details["loc"]


def _walk(model: type[Section], path: KeyPath) -> Iterator[tuple[int, FieldInfo]]:
    """The fields on the way down the path, with the length of the path to each."""
    section: type[Section] | None = model
    for length, part in enumerate(path, start=1):
        if isinstance(part, int):  # an item of a list, whose field came before
            continue
        if section is None or part not in section.model_fields:
            return
        field = section.model_fields[str(part)]
        yield length, field
        section = nested_section(field.annotation)


def _repair(model: type[Section], tree: dict[str, Any], path: KeyPath) -> None:
    """Replace what is wrong at the path: a required field gets its example, or null if it may be; anything else goes."""
    owner, key, depth = tree, path[0], 1
    while depth < len(path) and isinstance(owner.get(str(key)), dict):
        owner, key, depth = owner[str(key)], path[depth], depth + 1
    field = dict(_walk(model, path)).get(depth)
    if field is not None and field.is_required():
        instead: dict[str, Any] | None = None if type(None) in get_args(field.annotation) else {}
        owner[str(key)] = field.examples[0] if field.examples else instead
    else:
        owner.pop(str(key), None)


def _all_keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        section = nested_section(field.annotation)
        if section is not None:
            yield from _all_keys(section, f"{prefix}{name}.")


_TYPES: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
}

_BOUNDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than": lambda context: f"must be greater than {number(context['gt'])}",
    "greater_than_equal": lambda context: f"must be at least {number(context['ge'])}",
    "less_than": lambda context: f"must be less than {number(context['lt'])}",
    "less_than_equal": lambda context: f"must be at most {number(context['le'])}",
}


def _message(model: type[Section], details: ErrorDetails) -> str:
    kind, got, context = details["type"], details["input"], details.get("ctx", {})
    if kind in _TYPES:
        return f"must be {_TYPES[kind]} (got {shown(got)})"
    if kind in _BOUNDS:
        return f"{_BOUNDS[kind](context)} (got {shown(got)})"
    if kind == "extra_forbidden":
        *above, key = _path(details)
        return unknown_key(str(key), _fields_at(model, tuple(above)))
    if kind == "literal_error":
        *_, (_, field) = _walk(model, _path(details))
        near = suggestion(str(got), literal_choices(field.annotation))
        return (
            f"unknown {details['loc'][-1]} {shown(got)}{nearest(str(got)) if details['loc'][-1] == 'format' else near}"
        )
    if kind == "missing":
        return "required, but missing"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "value_error":
        return str(context["error"])
    return details["msg"]


def _fields_at(model: type[Section], path: KeyPath) -> Mapping[str, FieldInfo]:
    fields = list(_walk(model, path))
    section = nested_section(fields[-1][1].annotation) if fields else model
    return {} if section is None else section.model_fields
