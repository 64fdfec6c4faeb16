"""How a model uses its linears: which of them can be quantized, and which read the same tensor.

A quantized linear stands in for a module that is called and computes x W^T + b. Not every linear of the world is one: a
router may be a subclass of nn.Linear that returns indices, Mamba multiplies by the weight of its dt_proj without calling
it, a vision tower is not called for text. Those are left as they are, and the reason is kept for the user.

It is found by running two tokens through the architecture on the meta device, which costs no memory and no arithmetic.
Where a model does not run there (it asks for a value) its source is searched for reads of a weight instead; inputs are
then taken to differ, which computes the same numbers, and every linear to be called.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES = (nn.Linear, Conv1D)
PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)
READS_WEIGHT = "the model reads their weight itself"
NOT_CALLED = "not called for text"
NUM_NAMED = 4
TIED = "their weight is tied to the embeddings"


@dataclass(frozen=True)
class Survey:
    """What was found about the linears of a model.

    Attributes:
        head: name of the output head, or None.
        first_reader: linear -> first linear that is called with the very same tensor (q for q/k/v, gate for gate/up).
        unfit: linear -> why it cannot be quantized.
        tied: linears that share their weight with something else, such as the embeddings.
        complaint: what the model says to text alone, where it refuses it; None where it runs, or failed for other reasons.
    """

    head: str | None
    first_reader: Mapping[str, str]
    unfit: Mapping[str, str]
    tied: frozenset[str]
    complaint: str | None = None


def named_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of the model by name, lm_head included, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LINEAR_TYPES)}


def effective_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in), whatever way round the weight is stored."""
    first, second = linear.get_parameter("weight").shape
    return (first, second) if isinstance(linear, nn.Linear) else (second, first)


def survey(model: nn.Module) -> Survey:
    """Look at a model's linears; one on the meta device will do. The model is left as it is."""
    linears = named_linears(model)
    unfit = {
        name: f"{type(m).__name__} computes more than a product" for name, m in linears.items() if not _is_plain(m)
    }
    first_reader = {name: name for name in linears}
    used = _dry_run(model)
    if isinstance(used, _Use):
        first_reader |= used.first_reader
        misused = dict.fromkeys(used.reads, READS_WEIGHT)
        misused |= {name: NOT_CALLED for name in linears if name not in used.first_reader and name not in used.reads}
    else:
        misused = dict.fromkeys(_weights_read_in_source(model, linears), READS_WEIGHT)
    unfit = {name: (misused | unfit)[name] for name in linears if name in misused or name in unfit}
    complaint = str(used) if isinstance(used, ValueError) else None
    return Survey(_output_head_name(model, linears), first_reader, unfit, frozenset(_tied(model, linears)), complaint)


def described(unfit: Mapping[str, str]) -> str:
    """In words: names with their block's number as `*`, grouped by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in unfit.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{kinds(those)} ({reason})" for reason, those in names.items())


def kinds(linears: Iterable[str]) -> str:
    """Their names with the block's number as `*`, the first few of them."""
    names = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in linears))
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def _is_plain(module: nn.Module) -> bool:
    """Whether calling it gives x W^T + b. A class with a forward of its own is tried out on a small weight."""
    if getattr(module.forward, "__func__", None) in PLAIN_FORWARDS:
        return "weight" in module._parameters  # a parametrized one computes it anew at each call
    generator = torch.Generator().manual_seed(0)
    num_in, num_out = 4, 6
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((num_out, num_in), (num_out,)))
    small = copy.copy(module)
    small.__dict__ |= {
        "_parameters": {
            "weight": weight.t().contiguous() if isinstance(module, Conv1D) else weight,
            "bias": None if module._parameters.get("bias") is None else bias,
        },
        **({"nf": num_out, "nx": num_in} if isinstance(module, Conv1D) else {}),
        **({"in_features": num_in, "out_features": num_out} if isinstance(module, nn.Linear) else {}),
    }
    with torch.no_grad():
        for shape in ((3, num_in), (2, 3, num_in)):
            x = torch.randn(shape, generator=generator)
            try:
                y = small.forward(x)
            except Exception:  # whatever it raises, it is not a linear's forward
                return False
            expected = F.linear(x, weight, small._parameters["bias"])
            if not isinstance(y, Tensor) or y.shape != expected.shape or not torch.allclose(y, expected, atol=1e-5):
                return False
    return True


@dataclass(frozen=True)
class _Use:
    """What a dry run saw: who is called, first with which tensor, and whose weights are read from outside."""

    first_reader: dict[str, str]
    reads: set[str]


class _AnsweringItems(TorchDispatchMode):
    """Answers questions for a value, such as whether a mask is all True, with 1: on the meta device there are none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype is torch.bool else 1
        return func(*args, **(kwargs or {}))


def _dry_run(model: nn.Module) -> _Use | Exception | None:
    """Two tokens through the architecture on the meta device, or what it raised where it is given tokens alone."""
    failure = None
    for skeleton, run in dry_runs(model):
        use = _Use({}, set())
        try:
            with _watched(named_linears(skeleton), use), torch.no_grad():
                run()
        except Exception as error:  # the code of any model: it may fail in every way
            failure = error
            continue
        return use
    return failure


def dry_runs(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[], Any]]]:
    """(the model's architecture on the meta device, two tokens through it), each time with another mask; nothing where no
    config describes it."""
    config = getattr(model, "config", None)
    if config is None:
        return
    with torch.device("meta"):
        try:
            skeleton = type(model)(config).to(torch.bfloat16).eval()  # grouped products know no other dtype there
        except Exception:  # no model that its config describes
            return
        tokens = torch.zeros(1, 2, dtype=torch.long)
        # A mask in full spares most models the look at its values.
        masks = torch.ones(1, 1, 2, 2, dtype=torch.bool), torch.ones_like(tokens)

    def run(given: Mapping[str, Tensor]) -> Any:
        with torch.device("meta"), _AnsweringItems():
            return skeleton(input_ids=tokens, use_cache=False, **given)

    for given in (*({"attention_mask": mask} for mask in masks), {}):
        yield skeleton, partial(run, given)


@contextmanager
def _watched(linears: Mapping[str, nn.Module], use: _Use) -> Iterator[None]:
    """Note in `use` what is called and what is read meanwhile."""
    calls: set[str] = set()  # those that are at work
    seen: dict[int, tuple[Tensor, str]] = {}  # holds the tensors, so that an id is not used twice
    handles: list[Any] = []
    kinds = {name: type(module) for name, module in linears.items()}

    def enter(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            calls.add(name)
            x = args[0] if args else None
            first = seen.setdefault(id(x), (x, name))[1] if isinstance(x, Tensor) else name
            use.first_reader.setdefault(name, first)

        return hook

    def leave(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _module, _args, _result: calls.discard(name)

    def reading(name: str, kind: type[nn.Module]) -> Callable[[nn.Module, str], Any]:
        def get(module: nn.Module, attribute: str) -> Any:
            if attribute in ("weight", "bias") and name not in calls:
                use.reads.add(name)
            return kind.__getattr__(module, attribute)

        return get

    try:
        for name, module in linears.items():
            kind = kinds[name]
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
            module.__class__ = type(kind.__name__, (kind,), {"__getattr__": reading(name, kind)})
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            module.__class__ = kinds[name]


def _weights_read_in_source(model: nn.Module, linears: Mapping[str, nn.Module]) -> set[str]:
    """Linears of which some method of their parent reads `self.<name>.weight` or `.bias`."""
    reads = {kind: _reads_of_children(kind) for kind in {type(module) for module in model.modules()}}
    return {
        name
        for name in linears
        for parent, _, child in [name.rpartition(".")]
        if child in reads[type(model.get_submodule(parent))]
    }


def _reads_of_children(kind: type[nn.Module]) -> set[str]:
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or base in (object, PreTrainedModel):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made at run time: it has no source
            continue
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and method.name not in ("__init__", "_init_weights"):
                found |= {child for node in ast.walk(method) if (child := _child_read(node)) is not None}
    return found


def _child_read(node: ast.AST) -> str | None:
    """`x` where the node is `self.x.weight` or `self.x.bias`."""
    match node:
        case ast.Attribute(
            value=ast.Attribute(value=ast.Name(id="self"), attr=child), attr="weight" | "bias", ctx=ast.Load()
        ):
            return child
    return None


def _output_head_name(model: nn.Module, linears: Mapping[str, nn.Module]) -> str | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return next((name for name, module in linears.items() if module is head), None)


def _tied(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[str]:
    """Linears whose weight another kind of module holds too."""
    elsewhere = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, LINEAR_TYPES)
        for parameter in module.parameters(recurse=False)
    }
    return (name for name, module in linears.items() if id(module._parameters.get("weight")) in elsewhere)
