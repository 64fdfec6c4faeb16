"""Looking at a model's modules while it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def seeing_inputs(model: nn.Module, eyes: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """For as long as the block lasts, each of these modules shows what it is about to compute with; by the module's name."""
    with ExitStack() as hooks:
        for name, see in eyes.items():
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(lambda _, args, see=see: see(args[0])))
        yield


@contextmanager
def seeing_outputs(model: nn.Module, eyes: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """The same of what each has computed, which a hook `(module, args, kwargs, output)` sees and may replace."""
    with ExitStack() as hooks:
        for name, hook in eyes.items():
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        yield
