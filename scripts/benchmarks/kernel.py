"""One tensor: fake quantization with amax, in one pass, against a scale-and-copy of the same tensor.

The scale-and-copy reads every value once and writes it once: the physical floor of anything memory-bound. The reference is
the faster of two, torch.compile's and torch's own (whose call costs less, which shows on small tensors). Like the
quantizer they return a new tensor; `scale_copy_warm` writes to one that exists already, to show what fresh pages cost.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.arms import arm_names, torchao_fp8_quantizer
from benchmarks.timing import Progress, Row, Settings, interleave, rows_against
from qatrun.numerics import GRIDS, amax, inverse_scale, quantize, scale_from_amax

FLOORS = ("scale_copy_compiled", "scale_copy_torch")
COLUMNS = 512
SIZES_MIB = {"cpu": (1, 8, 64), "cuda": (16, 256, 1024)}
LONG_ENOUGH = 2**24  # bytes a measurement should move


def benchmark(settings: Settings, progress: Progress) -> list[Row]:
    """A case for each dtype and size, with every format: bare, with the mask that the clipped STE needs, and with codes."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for values in _sizes(settings, dtype):
            rows += _case(values, dtype, settings, progress)
    return rows


def _sizes(settings: Settings, dtype: torch.dtype) -> list[int]:
    if settings.values is not None:
        return [settings.values]
    sizes = SIZES_MIB[settings.device]
    return [mib * 2**20 // dtype.itemsize for mib in (sizes[1:] if settings.quick else sizes)]


def _case(values: int, dtype: torch.dtype, settings: Settings, progress: Progress) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(values // COLUMNS, COLUMNS, generator=generator).to(settings.device, dtype)
    name = f"{'bf16' if dtype == torch.bfloat16 else 'fp32'} {_size_name(x)}"
    contestants = _contestants(x, with_torchao=not settings.quick and "torchao_fp8" in arm_names())
    for run in contestants.values():
        run()
    rounds = 10 if settings.quick else 30
    inner = max(1, LONG_ENOUGH // (x.nbytes * 2))
    progress.begin(f"kernel {name}", rounds)
    seconds = interleave(contestants, rounds, settings.device, progress, inner)
    floor = min(FLOORS, key=lambda arm: statistics.median(seconds[arm]))
    return rows_against(floor, seconds, "kernel", name)


def _contestants(x: Tensor, *, with_torchao: bool) -> dict[str, Callable[[], object]]:
    one, warm = torch.ones((), device=x.device), torch.empty_like(x)
    compiled = torch.compile(lambda x, scale: (x * scale).to(x.dtype), dynamic=True)
    runs: dict[str, Callable[[], object]] = {
        FLOORS[0]: partial(compiled, x, one),
        FLOORS[1]: partial(torch.mul, x, one),
        "scale_copy_warm": partial(torch.mul, x, one, out=warm),
    }
    for name, grid in GRIDS.items():
        target = grid.format.target_amax["input"]
        inv_scale = inverse_scale(scale_from_amax(amax(x, "per_tensor"), target))
        run = partial(quantize, x, inv_scale, grid, None, values=x.dtype)
        runs[name] = run
        runs[f"{name}+mask"] = partial(run, blocked=True)
        runs[f"{name}+mask+codes"] = partial(run, blocked=True, codes=True)
    if with_torchao:
        runs["torchao_fp8_compiled"] = partial(torch.compile(torchao_fp8_quantizer(), dynamic=True), x)
    return runs


def _size_name(x: Tensor) -> str:
    return f"{x.nbytes / 2**20:.3g} MiB"
