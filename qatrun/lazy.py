"""Packages whose names are resolved when first used (PEP 562): importing one imports none of the modules it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        homes: module -> the names that it defines; under the package itself, modules of its own. Any other name must not
            be that of a module of the package: once imported, the module would stand in its place.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def resolve(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        home = home_of[name]
        return import_module(f"{home}.{name}") if home == package else getattr(import_module(home), name)

    return resolve
