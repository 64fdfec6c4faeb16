"""From a key to the line it stands on, for problems that only model and data could show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qatrun.errors import Problem
from qatrun.recipe.loader import read_document


def locate(problems: Iterable[Problem], path_or_name: str, overrides: Sequence[str] = ()) -> list[Problem]:
    """The problems with the file and line of their key (for an absent key, of the mapping around it), sorted by line.

    Args:
        path_or_name, overrides: as given to `load_recipe`, which accepted them.
    """
    document = read_document(path_or_name, overrides)
    # Names of tasks and arms may hold dots themselves, so a key that is there is looked up whole.
    paths = {".".join(map(str, path)): path for path in document.places}
    placed = [(document.place(paths.get(problem.key, tuple(problem.key.split(".")))), problem) for problem in problems]
    ordered = sorted(placed, key=lambda pair: pair[0].order)
    return [
        Problem(problem.message, problem.key, problem.where or place.where if problem.key else problem.where)
        for place, problem in ordered
    ]
