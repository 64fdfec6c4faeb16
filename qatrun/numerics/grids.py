"""The grid of each format, and what is done with one by its name. Not differentiable (see `fake_quantize`).

To add a format: its range in `qatrun.formats`, a module with its `Grid` beside those here, and a line in `GRIDS`.
"""

from __future__ import annotations

from torch import Tensor

from qatrun.formats import Format, get_format
from qatrun.numerics.fp8 import FP8_E4M3, FP8_E5M2
from qatrun.numerics.grid import Grid, Overflow, as_float32
from qatrun.numerics.hif8 import HIF8
from qatrun.numerics.int8 import INT8

GRIDS: dict[str, Grid] = {grid.format.name: grid for grid in (HIF8, FP8_E4M3, FP8_E5M2, INT8)}


def grid_of(format: str | Format) -> Grid:
    """The grid of a format, given it or its name.

    Raises:
        InputError: unknown format.
    """
    return GRIDS[format.name if isinstance(format, Format) else get_format(format).name]


def round_to_format(
    x: Tensor, format: str | Format, *, overflow: Overflow = "saturate", limit: float | None = None
) -> Tensor:
    """Round x to the nearest value of the format's grid.

    HiF8 rounds ties away from zero, the others to even. Small negative values become -0 in FP8 and +0 in HiF8 and INT8,
    which have no -0.

    Args:
        x: any shape; float32, bfloat16 or float16; in units of the grid (that is, already divided by the scale).
        format: a format or its name.
        overflow: what becomes of values that round past the largest finite one, Inf included. "saturate": the largest
            finite value. "inf": Inf in formats that have it (HiF8, E5M2), else NaN.
        limit: magnitudes above it are clipped to it first; a value of the grid, such as target_amax. None: the
            format's own range is the only edge.
    Returns:
        Shape and dtype of x. NaN stays NaN.
    Raises:
        TypeError: x is of another dtype.
        InputError: unknown format.
    """
    return grid_of(format).round(as_float32(x), limit, overflow).to(x.dtype)


def saturates(x: Tensor, format: str | Format, limit: float | None = None) -> Tensor:
    """Where rounding x, in units of the grid, hits an edge (see `Grid.saturates`): shape of x, bool."""
    return grid_of(format).saturates(as_float32(x), limit)


def encode(x: Tensor, format: str | Format, *, overflow: Overflow = "saturate") -> Tensor:
    """Round x to the format's grid and return the codes that hardware stores.

    Args:
        x: any shape; float32, bfloat16 or float16; in units of the grid.
        format: a format or its name.
        overflow: as in `round_to_format`.
    Returns:
        Shape of x; uint8, for INT8 int8. NaN has one code: 0x80 in HiF8, 0x7F in FP8, -128 in INT8.
    Raises:
        TypeError: x is of another dtype.
        InputError: unknown format.
    """
    grid = grid_of(format)
    return grid.encode(grid.round(as_float32(x), overflow=overflow))


def decode(codes: Tensor, format: str | Format) -> Tensor:
    """The values that codes stand for; every code of the format has one, NaN and Inf included.

    Args:
        codes: any shape; uint8, for INT8 int8.
        format: a format or its name.
    Returns:
        Shape of codes, float32; exact in bfloat16 and float16 too.
    Raises:
        InputError: unknown format.
    """
    return grid_of(format).decode(codes)
