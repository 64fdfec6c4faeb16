"""Every format against an independent implementation, exhaustively where 16 bits allow it.

Oracles: en_dtypes (HiF8), ml_dtypes (FP8), numpy's rint (INT8). Results are compared as bit patterns, so the sign of a
zero counts; NaN counts as equal to NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import en_dtypes
import ml_dtypes
import numpy as np
import pytest
import torch
from compilers import needs_compiler
from torch import Tensor

from qatrun.formats import FORMATS, get_format
from qatrun.numerics import Overflow, decode, encode, fake_quantize, round_to_format, saturates

FLOAT_DTYPES = {
    "hif8": en_dtypes.hifloat8,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}
ALL_CODES = torch.arange(256, dtype=torch.uint8)
ALL_16_BITS = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)


def oracle(x: Tensor, name: str, overflow: Overflow) -> Tensor:
    """float32 -> float32 grid values."""
    values = x.numpy()
    largest = get_format(name).max_finite
    with np.errstate(all="ignore"):
        if name == "int8":
            rounded = np.rint(values) + np.float32(0)
            if overflow == "saturate":
                return torch.from_numpy(np.clip(rounded, -largest, largest))
            return torch.from_numpy(np.where(np.abs(rounded) > largest, np.float32("nan"), rounded))
        if overflow == "saturate":
            values = np.clip(values, np.float32(-largest), np.float32(largest))
        return torch.from_numpy(values.astype(FLOAT_DTYPES[name]).astype(np.float32))


def grid_of(name: str) -> np.ndarray:
    """All finite values, ascending, float64."""
    if name == "int8":
        return np.arange(-127.0, 128.0)
    values = np.arange(256, dtype=np.uint8).view(FLOAT_DTYPES[name]).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def ties_and_boundaries(name: str) -> Tensor:
    """Grid values, midpoints, the points of overflow and underflow, and both float32 neighbours of each; float32."""
    grid = grid_of(name)
    last_step = grid[-1] - grid[-2]
    special = [40960.0, 464.0, 61440.0, 2.0**-23, 2.0**-24, 65504.0, 3.4028235e38, 1e-45, np.inf]
    points = np.concatenate(
        [grid, (grid[1:] + grid[:-1]) / 2, [grid[-1] + last_step / 2, grid[-1] + last_step], special]
    )
    points = np.concatenate([points, -points]).astype(np.float32)
    with np.errstate(under="ignore", over="ignore"):
        up, down = (np.nextafter(points, np.float32(side)) for side in (np.inf, -np.inf))
    return torch.from_numpy(np.concatenate([points, up, down, np.float32([-0.0, np.inf, -np.inf, np.nan])]))


def random_patterns() -> Tensor:
    """10^6 float32 numbers, every bit pattern as likely as any other: NaN, Inf and subnormals included."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 1 << 32, 10**6, dtype=np.uint32).view(np.float32))


SAMPLES: dict[str, Callable[[str], Tensor]] = {
    "bfloat16": lambda _: ALL_16_BITS.view(torch.bfloat16),
    "float16": lambda _: ALL_16_BITS.view(torch.float16),
    "random": lambda _: random_patterns(),
    "boundaries": ties_and_boundaries,
}


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    pattern = torch.int32 if actual.dtype == torch.float32 else torch.int16
    same = (actual.view(pattern) == expected.view(pattern)) | (actual.isnan() & expected.isnan())
    wrong = (~same).nonzero().flatten()[:5]
    assert same.all(), f"{(~same).sum()} differ, first at {wrong}: {actual[wrong]} instead of {expected[wrong]}"


@pytest.mark.parametrize("overflow", ["saturate", "inf"])
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_equals_the_oracle(name: str, sample: str, overflow: Overflow) -> None:
    x = SAMPLES[sample](name)
    assert_same_bits(round_to_format(x, name, overflow=overflow), oracle(x.float(), name, overflow).to(x.dtype))


@pytest.mark.parametrize("name", FLOAT_DTYPES)
def test_decoding_equals_the_oracle_on_all_codes(name: str) -> None:
    assert_same_bits(decode(ALL_CODES, name), torch.from_numpy(ALL_CODES.numpy().view(FLOAT_DTYPES[name]).astype("f4")))


@pytest.mark.parametrize("name", FLOAT_DTYPES)
def test_every_code_but_a_nan_comes_back(name: str) -> None:
    values = decode(ALL_CODES, name)
    codes = encode(values, name, overflow="inf")
    assert torch.equal(codes[~values.isnan()], ALL_CODES[~values.isnan()])
    assert set(codes[values.isnan()].tolist()) == ({0x80} if name == "hif8" else {0x7F})


def test_int8_codes_are_the_integers_and_a_nan() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)
    values = decode(codes, "int8")
    assert values[0].isnan()
    assert torch.equal(values[1:], torch.arange(-127.0, 128.0))
    assert torch.equal(encode(values, "int8"), codes)


@pytest.mark.parametrize("overflow", ["saturate", "inf"])
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", FORMATS)
def test_code_domain_equals_value_domain(name: str, sample: str, overflow: Overflow) -> None:
    x = SAMPLES[sample](name)
    rounded = round_to_format(x, name, overflow=overflow)
    codes = encode(x, name, overflow=overflow)
    assert torch.equal(encode(rounded, name, overflow=overflow), codes)
    assert_same_bits(decode(codes, name).to(x.dtype), rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_grid_is_exact_in_16_bits(name: str, dtype: torch.dtype) -> None:
    grid = torch.from_numpy(grid_of(name))
    assert torch.equal(grid.to(dtype).double(), grid)


@pytest.mark.parametrize("name", FORMATS)
def test_saturation_is_where_the_unclipped_grid_goes_past_the_limit(name: str) -> None:
    x = ties_and_boundaries(name)
    unclipped = oracle(x, name, "saturate")
    grid = grid_of(name)
    for limit in grid[grid > 0][:-1].tolist():
        assert torch.equal(saturates(x, name, limit), unclipped.abs() > limit), limit
        assert_same_bits(round_to_format(x, name, limit=limit), unclipped.clamp(-limit, limit))


@pytest.mark.parametrize("name", FORMATS)
def test_saturation_at_the_formats_own_edge_is_overflow(name: str) -> None:
    x = ties_and_boundaries(name)
    overflowed = oracle(x, name, "inf")
    is_overflow = (overflowed.isinf() | overflowed.isnan()) & ~x.isnan()
    assert torch.equal(saturates(x, name), is_overflow)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        round_to_format(torch.zeros(1, dtype=dtype), "hif8")


@needs_compiler
def test_compiled_equals_eager_bit_for_bit() -> None:
    def all_formats(x: Tensor) -> list[Tensor]:
        rounded = [round_to_format(x, name) for name in FORMATS]
        return rounded + [decode(encode(x, name, overflow="inf"), name) for name in FORMATS]

    boundaries = [ties_and_boundaries(name) for name in FORMATS]
    x = torch.cat([ALL_16_BITS.view(torch.bfloat16).float(), *boundaries, random_patterns()[:100_000]])
    for compiled, eager in zip(torch.compile(all_formats, fullgraph=True)(x), all_formats(x), strict=True):
        assert_same_bits(compiled, eager)


@needs_compiler
def test_compiled_fake_quantize_equals_eager_with_its_gradient() -> None:
    def step(x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(x, scale, "hif8", clip="target", target_amax=15.0, ste="clipped")

    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    scale = torch.tensor(0.1)
    results = []
    for fake in (step, torch.compile(step, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        x_hat = fake(leaf, scale)
        x_hat.backward(x)
        results.append((x_hat.detach(), leaf.grad))
    (eager, eager_grad), (compiled, compiled_grad) = results
    assert_same_bits(compiled, eager)
    assert eager_grad is not None
    assert compiled_grad is not None
    assert (eager_grad == 0).any()
    assert_same_bits(compiled_grad, eager_grad)
