"""Something to do when another package's module is first imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call `act` with the module of that name as soon as it has been executed; at once where that was before."""
    if module := sys.modules.get(name):
        act(module)
    else:
        sys.meta_path.insert(0, _Waiting(name, act))


class _Waiting(MetaPathFinder):
    """Lets the other finders find the one module, and follows its loader."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _follow(spec.loader, self.act)
        return spec


def _follow(loader: Loader, act: Callable[[ModuleType], None]) -> None:
    execute = loader.exec_module

    def executed(module: ModuleType) -> None:
        execute(module)
        act(module)

    loader.exec_module = executed  # type: ignore[method-assign]
