"""Experts of a mixture, which transformers holds in 3-D parameters: each expert's slice is a linear of its own.

    experts.gate_up_proj     [experts, out, in], or [experts, in, out]; likewise down_proj and, without a gate, up_proj
    experts.gate_up_proj.3   the fourth expert's linear, by its name in plans, statistics and quantized folders

The experts of a parameter are quantized all or none. A weight has a scale for each expert; the inputs of a parameter's
experts share one, as engines have it, for they are parts of one tensor. A quantized module goes through the experts one by
one, as transformers does where it has no grouped product: tokens sorted by expert, a product each, weighted and added up.
While it observes it computes so too, since the input of the second product shows nowhere else. Under torch.compile the
graph breaks here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatrun.quant.expert_weights import Experts
from qatrun.quant.linear import FakeQuantized, Quantization, fake_quantized
from qatrun.quant.quantized import QuantizedLinear
from qatrun.quant.state import Mode


class ExpertLinear(FakeQuantized):
    """What fake-quantizes one expert's slice of a parameter."""

    bias = None

    def __init__(self, module: nn.Module, experts: Experts, index: int, quant: Quantization) -> None:
        self.module, self.experts, self.index, self.quant = module, experts, index, quant

    @property
    def name(self) -> str:
        """Of the linear."""
        return self.experts.linears[self.index]

    @property
    def parameter(self) -> nn.Parameter:
        """All experts' weights."""
        return getattr(self.module, self.experts.leaf)  # type: ignore[no-any-return]

    def owner_of(self, weight: Tensor) -> Tensor | None:
        """Any slice is one of the parameter's."""
        return self.parameter

    def effective_weight(self) -> Tensor:
        """[out, in]"""
        weight = self.parameter[self.index]
        return weight.t() if self.experts.transposed else weight

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [tokens, in] -> [tokens, out], by a slice [out, in] of the parameter."""
        if self.quant.state.mode is Mode.QUANTIZE:
            if not len(x) and self.quant.state.training:
                self.quant.of["weight"].observe(weight)  # no token came, but the scale must follow the weight
            return fake_quantized(x, weight, bias, self) if len(x) else x @ weight.t()
        y = F.linear(x, weight, bias)
        self.observe(x, weight)
        if "grad_output" in self.quant.of and y.requires_grad:
            y.register_hook(self.observe_gradient)
        return y


class _ExpertsModule(nn.Module):
    """An experts module under another class, which deals out tokens and adds up what comes back."""

    plain_class: type[nn.Module]

    def __reduce__(self) -> tuple[Any, ...]:
        kind = next(base for base in (FakeQuantExperts, QuantizedExperts) if isinstance(self, base))
        return _without_state, (kind, self.plain_class), self.__dict__  # the class has no name that pickle could find

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _by_expert(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """[tokens, hidden] -> the same.

        Args:
            routing: each token's experts and their weights, [tokens, top_k] both; none where each expert has as many
                tokens, one after the other.
        """
        this: Any = self
        first = "gate_up_proj" if getattr(this, "has_gate", True) else "up_proj"
        if not routing:
            tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
            counts = [len(tokens) // this.num_experts] * this.num_experts
            gate, up = self._products(first, tokens, counts).chunk(2, dim=-1)
            return self._products("down_proj", up * this.act_fn(gate), counts)
        index, weights = routing
        chosen = index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=this.num_experts).tolist()
        x = self._products(first, hidden_states[order // index.shape[-1]], counts)
        x = this._apply_gate(x) if this.has_gate else this.act_fn(x)
        x = self._products("down_proj", x, counts)
        if this.has_post_expert_norm:
            x = this.post_expert_norm(x)
        x = (x * weights.reshape(-1)[order].unsqueeze(-1))[order.argsort()]
        return x.view(*index.shape, -1).sum(dim=1).to(hidden_states.dtype)

    def _products(self, leaf: str, x: Tensor, counts: list[int]) -> Tensor:
        """The product of each expert with its tokens, which stand one after the other in x."""
        return torch.cat([product(part) for product, part in zip(self._linears(leaf), x.split(counts), strict=True)])

    def _linears(self, leaf: str) -> Iterator[Callable[[Tensor], Tensor]]:
        """What multiplies by each expert's weight."""
        weights, biases = getattr(self, leaf).unbind(0), self._biases(leaf)
        for weight, bias in zip(weights, biases, strict=True):
            yield partial(F.linear, weight=weight.t() if getattr(self, "is_transposed", True) else weight, bias=bias)

    def _biases(self, leaf: str) -> tuple[Tensor | None, ...]:
        biases: Tensor | None = getattr(self, f"{leaf}_bias", None)
        num: Any = self.num_experts
        return (None,) * num if biases is None else biases.unbind(0)


class FakeQuantExperts(_ExpertsModule):
    """Experts while they train; parameters and keys of `state_dict` stay as they are.

    Attributes:
        quants: parameter -> its experts' linears; those of a parameter that is not planned are left out.
    """

    quants: dict[str, list[ExpertLinear]]

    @staticmethod
    def put_on(module: nn.Module, quants: Mapping[Experts, list[Quantization]]) -> None:
        """Make the module one of these."""
        module.__class__ = _kind_of(FakeQuantExperts, type(module))
        module.__dict__["quants"] = {
            experts.leaf: [ExpertLinear(module, experts, index, quant) for index, quant in enumerate(of_experts)]
            for experts, of_experts in quants.items()
        }

    def all_linears(self) -> Iterator[ExpertLinear]:
        """Of all its parameters."""
        for linears in self.quants.values():
            yield from linears

    def take_off(self) -> None:
        """Make it the module that it was."""
        del self.quants
        self.__class__ = self.plain_class  # type: ignore[assignment]  # it is one of its subclasses

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """As the module's own."""
        state = next(self.all_linears()).quant.state
        if state.mode is Mode.QUANTIZE or (state.mode is Mode.OBSERVE and self.training):
            by_expert: Tensor = self._by_expert(hidden_states, *routing)
            return by_expert
        y: Tensor = super().forward(hidden_states, *routing)
        return y

    def _linears(self, leaf: str) -> Iterator[Callable[[Tensor], Tensor]]:
        if leaf not in self.quants:
            yield from super()._linears(leaf)
            return
        linears, weights = self.quants[leaf], getattr(self, leaf).unbind(0)
        for linear, weight, bias in zip(linears, weights, self._biases(leaf), strict=True):
            yield partial(linear, weight=weight.t() if linear.experts.transposed else weight, bias=bias)


class QuantizedExperts(_ExpertsModule):
    """Frozen experts: in place of each planned parameter a list of frozen linears, named as in the plan."""

    @staticmethod
    def put_on(module: nn.Module, leaf: str, linears: list[QuantizedLinear]) -> None:
        """Make the module one of these, or its next parameter frozen."""
        if not isinstance(module, QuantizedExperts):
            module.__class__ = _kind_of(QuantizedExperts, type(module))
        delattr(module, leaf)
        module.add_module(leaf, nn.ModuleList(linears))

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """As the module's own."""
        y: Tensor = self._by_expert(hidden_states, *routing)
        return y

    def _linears(self, leaf: str) -> Iterator[Callable[[Tensor], Tensor]]:
        frozen = getattr(self, leaf)
        if not isinstance(frozen, nn.ModuleList):
            yield from super()._linears(leaf)
            return
        for linear, bias in zip(frozen, self._biases(leaf), strict=True):
            product: Callable[..., Tensor] = linear.product  # type: ignore[assignment]  # of a QuantizedLinear
            yield partial(product, bias=bias)


_CLASSES: dict[tuple[type[_ExpertsModule], type[nn.Module]], type[_ExpertsModule]] = {}


def _kind_of(kind: type[_ExpertsModule], plain: type[nn.Module]) -> type[_ExpertsModule]:
    """The one class that modules of a plain class take on."""
    if (kind, plain) not in _CLASSES:
        _CLASSES[kind, plain] = type(f"{kind.__name__}Of{plain.__name__}", (kind, plain), {"plain_class": plain})
    return _CLASSES[kind, plain]


def _without_state(kind: type[_ExpertsModule], plain: type[nn.Module]) -> _ExpertsModule:
    made = _kind_of(kind, plain)
    return made.__new__(made)
