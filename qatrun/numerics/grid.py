"""A format at work: what rounds, encodes and decodes tensors, one object a format.

A format's own module knows its grid as if that had no upper end; here that end is put in: the format's largest finite
value, or a lower `limit`. Everything is computed in float32. The grids of all formats are exact in bfloat16 and in float16,
so casting a result to the dtype of the input loses nothing. The two domains agree exactly: decode(encode(x)) equals
round(x), and rounding x first changes no code. Codes are made by bit arithmetic rather than tables, which compiled code
would have to carry to the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qatrun.formats import Format

Overflow = Literal["saturate", "inf"]


class Grid(ABC):
    """One format's grid, a constant of its module. Values are in units of the grid, that is, at scale 1.

    Attributes:
        format: name and range.
        code_dtype: what codes are stored as.
        has_inf: whether an overflow has a code for Inf; else it is NaN.
        ties_away: half away from zero; else half to even.
        native: by which `native.cpp` knows the format; None where it has no kernel, and the reference runs.
    """

    code_dtype: torch.dtype = torch.uint8
    has_inf: bool
    ties_away: ClassVar[bool] = False
    native: int | None = None

    def __init__(self, format: Format) -> None:
        self.format = format

    def __reduce__(self) -> str:
        return self.format.name.upper()  # the constant's name: a copy is the same one

    @abstractmethod
    def round_unbounded(self, x: Tensor) -> Tensor:
        """Nearest values of the grid as if it had no upper end; float32 in and out, Inf and NaN stay."""

    @abstractmethod
    def spacing(self, value: float) -> float:
        """Distance from a value of the grid, > 0, to the next larger one."""

    @abstractmethod
    def encode(self, grid: Tensor) -> Tensor:
        """Codes of float32 values that are on the grid already, Inf and NaN included; any shape."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of codes of any shape, Inf and NaN included."""

    def edge(self, limit: float | None) -> float:
        """The largest magnitude that rounding gives under a limit."""
        return self.format.max_finite if limit is None else min(limit, self.format.max_finite)

    def round(self, x: Tensor, limit: float | None = None, overflow: Overflow = "saturate") -> Tensor:
        """Nearest values of the grid, clipped to +-limit first; float32 in and out (see `round_to_format`)."""
        if overflow == "saturate" or limit is not None:
            edge = self.edge(limit)
            x = x.clamp(-edge, edge)
        grid = self.round_unbounded(x)
        if overflow == "saturate":
            return grid
        past_end = float("inf") if self.has_inf else float("nan")
        return torch.where(grid.abs() > self.format.max_finite, torch.copysign(grid.new_full((), past_end), grid), grid)

    def saturates(self, x: Tensor, limit: float | None = None) -> Tensor:
        """Where rounding hits an edge: the grid, were it to go on, would have a nearer value than the one x becomes.

        A value a little above the edge that rounds to it anyway does not saturate; so the element that amax was taken
        from never does, even if its product with inv_scale lands an ulp above target_amax. NaN does not saturate, Inf
        does.

        Args:
            x: any shape, float32.
        Returns:
            Shape of x, bool.
        """
        edge = self.edge(limit)
        spacing = self.spacing(edge)
        magnitude = x.abs()
        tie_saturates = self.ties_away or edge / spacing % 2 == 1
        midpoint = edge + spacing / 2
        return magnitude >= midpoint if tie_saturates else magnitude > midpoint

    @cache  # noqa: B019 -- there is one grid a format, for good
    def saturation_threshold(self, limit: float | None) -> float:
        """The smallest float32 that saturates, found by bisection over float32 patterns."""
        low, high = 0, 0x7F80_0000  # 0 does not saturate, Inf does
        while high - low > 1:
            middle = (low + high) // 2
            value = torch.tensor(middle, dtype=torch.int32).view(torch.float32)
            low, high = (low, middle) if self.saturates(value, limit) else (middle, high)
        return float(torch.tensor(high, dtype=torch.int32).view(torch.float32))

    @cache  # noqa: B019
    def values_of_codes(self) -> Tensor:
        """[256] float32, by the code's bits as an unsigned number."""
        return self.decode(torch.arange(256, dtype=torch.uint8).view(self.code_dtype))


def as_float32(x: Tensor) -> Tensor:
    """x in float32, detached.

    Raises:
        TypeError: x is float64, which would be rounded twice, or no floating-point tensor.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"quantization takes float32, bfloat16 or float16 tensors, got {x.dtype}")
    return x.detach().to(torch.float32)
