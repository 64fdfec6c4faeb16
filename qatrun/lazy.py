"""Packages whose names are resolved when first used (PEP 562): importing one imports none of the modules it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        homes: name -> module that defines it. A name must not be that of a module of the package: once imported, the
            module would stand in its place.
    """

    def resolve(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(homes[name]), name)

    return resolve
