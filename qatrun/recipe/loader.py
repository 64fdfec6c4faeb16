"""From a file, a shipped name or a mapping to a checked `Recipe`. Every mistake is found and reported at once.

read the YAML -> what it extends, below it -> `--set`s, above it -> the schema -> each arm: the schema, then the rules

An arm is resolved here and nowhere else: the recipe's tree as it was given, the arm's overrides laid over it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qatrun.errors import Problem, RecipeError
from qatrun.paths import expand_path
from qatrun.recipe.document import (
    Document,
    InvalidYamlError,
    KeyPath,
    Mistake,
    Place,
    merge,
    read_yaml,
    with_override,
)
from qatrun.recipe.problems import unknown_key, validate
from qatrun.recipe.rules import Finding, arm_findings, study_findings, twin_findings
from qatrun.recipe.schema import ARM_KEYS, ARM_SECTIONS, START, Arm, Recipe
from qatrun.recipe.shipped import find_recipe
from qatrun.text import shown, suggestion

_YAML_SUFFIXES = (".yaml", ".yml")
MAX_BYTES = 1_000_000
_FIRST_OVERRIDE = 1_000  # sorts the `--set`s behind the files


def load_recipe(path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path_or_name: a YAML file, or the name of a shipped recipe.
        overrides: `key.path=value` each, the value in YAML; replaces the value of that key, in turn. Arms inherit it.
    Raises:
        RecipeError: everything that is wrong, one problem a line, sorted by file and line.
    """
    mistakes: list[Mistake] = []
    return _checked(_read(path_or_name, overrides, mistakes), mistakes)


def parse_recipe(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe given as a mapping, as `load_recipe` does one in a file.

    Raises:
        RecipeError: everything that is wrong, one problem a line.
    """
    mistakes: list[Mistake] = []
    return _checked(_with_overrides(Document(dict(values)), overrides, mistakes), mistakes)


def locate(problems: Iterable[Problem], path_or_name: str, overrides: Sequence[str] = ()) -> list[Problem]:
    """Problems that only model and data could show, with the file and line of their key (for an absent key, of the mapping
    around it), sorted by line.

    Args:
        path_or_name, overrides: as given to `load_recipe`, which accepted them.
    """
    document = _read(path_or_name, overrides, mistakes=[])
    # Names of tasks and arms may hold dots themselves, so a key that is there is looked up whole.
    paths = {Place("", (0, 0)).below(path).key: path for path in document.places}
    placed = [(document.place(paths.get(problem.key, tuple(problem.key.split(".")))), problem) for problem in problems]
    return [
        replace(problem, where=problem.where or place.where) if problem.key else problem
        for place, problem in sorted(placed, key=lambda pair: pair[0].order)
    ]


def _read(path_or_name: str | os.PathLike[str], overrides: Sequence[str], mistakes: list[Mistake]) -> Document:
    file = _recipe_file(os.fspath(path_or_name))
    document = _read_with_parents(file, Place(file, (0, 0)), (), mistakes)
    return _with_overrides(document, overrides, mistakes)


def _recipe_file(path_or_name: str) -> str:
    try:
        file = expand_path(path_or_name)
    except ValueError as error:
        raise RecipeError(f"the name of a recipe {error}") from None
    if file.endswith(_YAML_SUFFIXES) or os.path.isfile(file):  # noqa: PTH113  # False for a name that no file can have
        return file
    path = find_recipe(path_or_name).path
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _read_with_parents(file: str, named_at: Place, above: tuple[str, ...], mistakes: list[Mistake]) -> Document:
    """The file laid over what it extends; `above` are the files that extend it."""
    document = _read_file(file, named_at, len(above), mistakes)
    parent = document.tree.pop("extends", None)
    place = document.places.pop(("extends",), named_at)
    parent_file = None if parent is None else _parent_file(file, parent, place, mistakes)
    if parent_file is None:
        return document
    chain = (*above, os.path.realpath(file))
    if os.path.realpath(parent_file) in chain:
        mistakes.append(Mistake(place, f"'{parent}' extends this recipe in turn"))
        return document
    return merge(_read_with_parents(parent_file, place, chain, mistakes), document)


def _parent_file(file: str, parent: Any, place: Place, mistakes: list[Mistake]) -> str | None:
    if not isinstance(parent, str):
        mistakes.append(Mistake(place, f"must be a file or the name of a shipped recipe (got {shown(parent)})"))
        return None
    try:
        if parent.endswith(_YAML_SUFFIXES):
            return str(Path(file).parent / expand_path(parent))
        return _recipe_file(parent)
    except (RecipeError, ValueError) as error:
        mistakes.append(Mistake(place, str(error)))
        return None


def _read_file(file: str, named_at: Place, source: int, mistakes: list[Mistake]) -> Document:
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        other = [str(near) for end in _YAML_SUFFIXES if (near := Path(file).with_suffix(end)).is_file()]
        missing = f"no such file{suggestion(file, other)}"
        reason = missing if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        mistakes.append(Mistake(named_at, f"{reason}: '{file}'" if source else reason))
        raise _error(mistakes) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 text (byte 0x{content[error.start]:02x})"
        raise _error([*mistakes, Mistake(Place(f"{file}:{line}", (source, line)), message)]) from None
    if len(content) > MAX_BYTES:
        raise _error([*mistakes, Mistake(Place(file, (source, 0)), f"no recipe is larger than {MAX_BYTES:,} bytes")])
    try:
        document, found = read_yaml(text, file, source)
    except InvalidYamlError as error:
        raise _error([*mistakes, error.mistake]) from None
    mistakes.extend(found)
    return document


def _with_overrides(document: Document, overrides: Sequence[str], mistakes: list[Mistake]) -> Document:
    for index, text in enumerate(overrides):
        try:
            document, found = with_override(document, text, _FIRST_OVERRIDE + index)
            mistakes.extend(found)
        except InvalidYamlError as error:
            mistakes.append(error.mistake)
    return document


def _checked(document: Document, mistakes: list[Mistake]) -> Recipe:
    recipe, found, bad_paths = validate(Recipe, document)
    mistakes.extend(found)
    mistakes.extend(_located(study_findings(recipe), document, bad_paths))
    given = _arms_as_given(document, recipe).items()
    arms = {name: _resolved_arm(name, overrides, document, mistakes) for name, overrides in given}
    mistakes.extend(_located(twin_findings(arms), document, bad_paths))
    if mistakes:
        raise _error(mistakes)
    return recipe.with_arms(_with_twins(arms))


def _resolved_arm(name: str, given: dict[str, Any], document: Document, mistakes: list[Mistake]) -> Arm:
    """The arm with its overrides applied. Mistakes in what it shares are found once more, at the same place."""
    overrides = Document(given, document.places_below(("arms", name)))
    mistakes.extend(_keys_no_arm_may_have(overrides))
    merged = merge(document.only((*ARM_SECTIONS, "method", "monitor", "eval")), overrides.only(ARM_SECTIONS))
    of_arm = {key: overrides.tree[key] for key in ARM_KEYS if key in overrides.tree}
    merged.tree |= {"name": name, "twin": None, **of_arm}
    merged.places |= {(key,): overrides.place((key,)) for key in ("twin", *of_arm)}
    arm, found, bad_paths = validate(Arm, merged)
    mistakes.extend(found)
    mistakes.extend(_located(arm_findings(arm), merged, bad_paths))
    return arm


def _with_twins(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """A quantized arm that names no twin is compared with the only BF16 arm, where there is one; one that is not trained
    else with the start model."""
    bf16_arms = [name for name, arm in arms.items() if arm.qat is None]
    only = bf16_arms[0] if len(bf16_arms) == 1 else None
    return {
        name: arm
        if arm.qat is None or arm.twin
        else arm.model_copy(update={"twin": only if arm.trains else only or START})
        for name, arm in arms.items()
    }


def _arms_as_given(document: Document, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The arms' overrides, those of arms with an unusable name too; the recipe's default arms where it states none."""
    given = document.tree.get("arms")
    if not isinstance(given, dict):
        return recipe.arms
    return {name: overrides or {} for name, overrides in given.items() if isinstance(overrides, dict | None)}


def _keys_no_arm_may_have(overrides: Document) -> Iterator[Mistake]:
    choices = (*ARM_SECTIONS, *ARM_KEYS)
    for key in overrides.tree:
        if key in choices:
            continue
        is_shared = key in Recipe.model_fields or key == "extends"
        message = "is shared by all arms; no arm may change it" if is_shared else unknown_key(key, choices)
        yield Mistake(overrides.place((key,)), message)


def _located(findings: Iterator[Finding], document: Document, bad_paths: frozenset[KeyPath]) -> Iterator[Mistake]:
    for finding in findings:
        if any(key[: len(bad)] == bad[: len(key)] for key in finding.keys for bad in bad_paths):
            continue  # one of them lies on the way to the other
        written = [key for key in finding.keys if key in document.places]
        in_arm = [key for key in written if document.places[key].key.startswith("arms.")]
        blamed = (in_arm or written or finding.keys)[0]
        yield Mistake(document.place(blamed), finding.message)


def _error(mistakes: list[Mistake]) -> RecipeError:
    in_order = sorted(mistakes, key=lambda mistake: mistake.place.order)
    return RecipeError(tuple(dict.fromkeys(mistake.problem for mistake in in_order)))
