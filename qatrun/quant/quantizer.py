"""The quantizer of one slot: rounds a tensor with the slot's scale and records what it saw, both once for a tensor that
comes again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qatrun.numerics import GRIDS, amax, own_fit, reach
from qatrun.quant import operators
from qatrun.quant.qtensor import QTensor, to_grid
from qatrun.quant.scales import takes_own_scale
from qatrun.quant.state import Mode, QuantState
from qatrun.scheme import Scheme, Slot


class Quantizer:
    """Of an input (one for all linears that read it), of a weight or of an output gradient.

    Attributes:
        grid: that of the scheme's format.
        index: of the slot in the state.
        latest: what `on_grid_once` gave last.
        number: by which operators know it.
    """

    def __init__(self, slot: Slot, scheme: Scheme, state: QuantState) -> None:
        self.slot, self.scheme, self.state = slot, scheme, state
        self.grid, self.index = GRIDS[scheme.format], state.scales.index[slot]
        self.latest = Latest()
        self.number = operators.number(self)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self.number = operators.number(self)  # a copy is another one

    def observe(self, x: Tensor) -> None:
        """Record the amax of x, any shape; of an asymmetric slot its range too."""
        self._observe(x, amax(x, "per_tensor"))

    def on_grid(
        self, x: Tensor, values: torch.dtype | None, *, codes: bool = False, takes_gradient: bool = False
    ) -> QTensor:
        """x [..., d] quantized to values, codes or both (see `to_grid`); records what it saw while training."""
        state = self.state
        fit = own_fit(x, self.scheme) if self._takes_own_scale else state.scales.fit(self.index)
        result, seen = to_grid(x, self.scheme, fit, values, codes=codes, takes_gradient=takes_gradient)
        if state.training:
            self._observe(x, seen.amax)
            state.tally.count(self.index, seen.counts, x.numel())
            if state.tally.measures_noise:
                state.tally.measure_noise(self.index, x, result.dequantized())
        return result

    def on_grid_once(self, x: Tensor, values: torch.dtype | None, *, codes: bool, key: Tensor | None = None) -> QTensor:
        """The same, made once for every change of the scales or of `key`, the tensor that x is a view of."""
        key = x if key is None else key
        make = partial(self.on_grid, x, values, codes=codes, takes_gradient=key.requires_grad)
        return self.latest.get(key, make, values, codes, self.state.generation())

    def same_in_parts(self) -> bool:
        """Whether rows of a tensor that are quantized apart come to what the whole comes to, in all that is kept of it. Not
        where one scale for all is taken from the tensor itself, nor while noise is measured, which is a float32 sum."""
        if self.state.mode is not Mode.QUANTIZE or self.state.tally.measures_noise:
            return False
        return self.scheme.per_row or not self._takes_own_scale

    @property
    def _takes_own_scale(self) -> bool:
        return takes_own_scale(self.slot, self.scheme, primed=self.state.primed, training=self.state.training)

    def _observe(self, x: Tensor, amax: Tensor) -> None:
        self.state.scales.observe(self.index, amax, None if self.scheme.symmetric else reach(x, "per_tensor"))


class Latest:
    """Remembers the last tensor that was quantized and its result, so that the same tensor is not quantized twice.

    Linears that read one input share one of these, and each has one for its weight. A tensor is the same while it is the
    same object and unchanged in place: what autograd's version counter sees, so not a write through `.data`, which is
    noticed after the next push only. A result lives no longer than its tensor; a copy of this starts empty.
    """

    def __init__(self) -> None:
        self._tensor: Callable[[], Tensor | None] = lambda: None
        self._circumstances: tuple[object, ...] = ()
        self._result: QTensor | None = None

    def get(self, x: Tensor, make: Callable[[], QTensor], *circumstances: object) -> QTensor:
        """The result for x, made if it is not at hand; `circumstances` are what it depends on besides x."""
        if x.is_inference():  # it has no version counter
            return make()
        circumstances = (x._version, x.data_ptr(), x.requires_grad, *circumstances)
        if self._result is not None and self._tensor() is x and self._circumstances == circumstances:
            return self._result
        self._result = None  # before the new one is made, so that there are never two
        result = make()
        self._tensor, self._circumstances = weakref.ref(x, self.forget), circumstances
        self._result = result
        return result

    def forget(self, _: object = None) -> None:
        """Let the result go."""
        self._result = None

    def __reduce__(self) -> tuple[type[Latest], tuple[()]]:
        return Latest, ()
