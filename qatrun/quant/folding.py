"""Which modules make the input of which linears so plainly that its channels can be scaled where they are made, and the
linears' columns the other way, and the model computes as before.

    norm        y = w * normalized(x) (+ b): w and b of a channel scale it, exactly
    linear      y = f(...) * (W x + b), as an up-projection's is multiplied by the activated gate: rows of W and b scale it

It is read from the graph that autograd records of a dry run on the meta device, not from names: the input is the norm's
output itself, or a product with the linear's output and with nothing else that depends on it, and whoever else reads
either of them rules it out. What the graph does not show so plainly is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatrun.quant.linears import dry_runs, named_linears

PRODUCT = "MulBackward0"
CASTS = ("ToCopyBackward0", "TBackward0")  # between a parameter and its product
FUSED_NORMS = ("NativeLayerNormBackward0", "FusedRmsNormBackward0")


@dataclass(frozen=True)
class Fold:
    """Channels that can be scaled.

    Attributes:
        producer: of the input; a norm, or a linear whose output is multiplied with something.
        readers: every linear that reads it.
    """

    producer: str
    readers: tuple[str, ...]


def find_folds(model: nn.Module) -> tuple[Fold, ...]:
    """Of a model, one on the meta device will do; none where it does not run there."""
    config = getattr(model, "config", None)
    if config is None:
        return ()
    for skeleton, run in dry_runs(model):
        seen = _Seen(skeleton)
        try:
            with torch.enable_grad():
                seen.result = run()
        except Exception:  # the code of any model: it may fail in every way
            continue
        finally:
            seen.close()
        return tuple(_folds(skeleton, seen))
    return ()


class _Seen:
    """What a forward shows: each linear's input, and each norm's and linear's output. A module that is called more than
    once is in neither."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.result: Any = None
        self._calls: Counter[str] = Counter()
        linears = named_linears(model)
        self._handles = [
            module.register_forward_hook(self._hook(name, name in linears))
            for name, module in model.named_modules()
            if name in linears or _is_norm_like(module)
        ]

    def _hook(self, name: str, is_linear: bool) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._calls[name] += 1
            if is_linear and args and isinstance(args[0], Tensor):
                self.inputs[name] = args[0]
            if isinstance(output, Tensor):
                self.outputs[name] = output

        return hook

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def is_once(self, name: str) -> bool:
        return self._calls[name] == 1


def _is_norm_like(module: nn.Module) -> bool:
    """Whether it has a weight of one dimension, and perhaps a bias, and nothing else."""
    weight = module._parameters.get("weight")
    return (
        not module._modules and weight is not None and weight.dim() == 1 and {*module._parameters} <= {"weight", "bias"}
    )


def _folds(model: nn.Module, seen: _Seen) -> Iterator[Fold]:
    readers: dict[int, list[str]] = {}
    for name, x in seen.inputs.items():
        readers.setdefault(id(x), []).append(name)
    edges = _edges(seen)
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    single = {
        name
        for name in {*seen.outputs, *seen.inputs}
        if seen.is_once(name)
        and all(held[id(p)] == 1 for p in model.get_submodule(name)._parameters.values() if p is not None)
    }
    for names in readers.values():
        x = seen.inputs[names[0]]
        if not single.issuperset(names) or x.grad_fn is None or edges[x.grad_fn] != len(names):
            continue
        producer = _norm_of(model, seen.outputs, x) or _factor_of(model, seen.outputs, x, edges)
        if producer in single:
            yield Fold(str(producer), tuple(names))


def _edges(seen: _Seen) -> Counter[Any]:
    """Node of the graph -> how many others read what it makes."""
    result = seen.result
    logits: Any = getattr(result, "logits", None)
    edges: Counter[Any] = Counter()
    done, to_do = set(), [None if logits is None else logits.grad_fn]
    while to_do:
        node = to_do.pop()
        if node is None or node in done:
            continue
        done.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                edges[following] += 1
                to_do.append(following)
    return edges


def _norm_of(model: nn.Module, outputs: Mapping[str, Tensor], x: Tensor) -> str | None:
    """The norm whose output x is, where its weight scales it."""
    for name, output in outputs.items():
        module = model.get_submodule(name)
        if output is x and module._parameters["weight"].dim() == 1:  # type: ignore[union-attr]
            parameters = [id(p) for p in module._parameters.values() if p is not None]
            node: Any = x.grad_fn
            scaled = node.name() in (PRODUCT, *FUSED_NORMS) and len(parameters) == sum(
                id(_parameter(each)) in parameters for each, _ in node.next_functions
            )
            return name if scaled else None
    return None


def _parameter(node: Any) -> Any:
    """The parameter that an input of a node is, casts aside; None where it is none."""
    while node is not None and node.name() in CASTS:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _factor_of(model: nn.Module, outputs: Mapping[str, Tensor], x: Tensor, edges: Counter[Any]) -> str | None:
    """The linear that one factor of x is the output of; of two, the one that nobody else reads."""
    node: Any = x.grad_fn
    if node.name() != PRODUCT:
        return None
    factors = [factor for factor, _ in node.next_functions]
    for name, output in outputs.items():
        made_by = output.grad_fn
        if made_by in factors and edges[made_by] == 1 and output.shape == x.shape:
            return name if model.get_submodule(name)._parameters["weight"].dim() == 2 else None  # type: ignore[union-attr]
    return None
