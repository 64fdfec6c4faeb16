"""The one-pass kernels against the reference functions, bit for bit, in every variant that this processor runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qatrun.errors import InputError
from qatrun.formats import FORMATS
from qatrun.numerics import (
    GRIDS,
    codes_to_grid,
    decode,
    native,
    native_build,
    passes,
    quantize,
    rescale_,
    round_to_format,
    scale_gradient,
)

EVERY_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
DTYPES = (torch.float32, torch.bfloat16)
pytestmark = pytest.mark.skipif(native.variant() is None, reason="no C++ compiler")


@pytest.fixture(params=native_build.variants(), autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every variant that this processor runs."""
    monkeypatch.setenv("QATRUN_NATIVE", request.param)
    native.kernels.cache_clear()
    try:
        native.kernels()
    except InputError as refused:
        pytest.skip(str(refused))
    yield
    native.kernels.cache_clear()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_patterns(count: int, seed: int = 0) -> Tensor:
    """float32 of every kind: NaN, Inf, subnormals and both zeros among them."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.int32).view(torch.float32)


def ties_and_boundaries(format: str) -> Tensor:
    """Every value of the grid, every midpoint between two, and the float32 values beside each."""
    spec = FORMATS[format]
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode(codes.view(torch.int8) if format == "int8" else codes, format)
    grid = values[values.isfinite()].unique()
    exact = torch.cat(
        [grid, (grid[1:] + grid[:-1]) / 2, torch.tensor([1.25, 40960 / 2**15, 480 / 448]) * spec.max_finite]
    )
    infinity = torch.tensor(float("inf"))
    return torch.cat([exact, exact.nextafter(infinity), exact.nextafter(-infinity)])


def bits(x: Tensor | None) -> Tensor | None:
    """The pattern of each value; one for all NaN."""
    if x is None or not x.is_floating_point():
        return x
    return torch.where(x.isnan(), 0x7FC0_0000, x.float().view(torch.int32))


def assert_same(made: passes.Quantized, reference: passes.Quantized) -> None:
    for name, one, other in zip(passes.Quantized._fields, made, reference, strict=True):
        if other is None:
            assert one is None, name
        else:
            assert one is not None, name
            assert (one.dtype, one.shape) == (other.dtype, other.shape), name
            assert torch.equal(bits(one), bits(other)), name


def check(x: Tensor, inv_scale: Tensor, format: str, limit: float | None, dtype: torch.dtype | None) -> None:
    made = quantize(x, inv_scale, GRIDS[format], limit, values=dtype, codes=True, blocked=True)
    assert_same(made, passes._quantize_reference(x, inv_scale, format, limit, dtype, True, True))


@pytest.mark.parametrize("limit", [None, 15.0])
@pytest.mark.parametrize("format", FORMATS)
class TestQuantize:
    def test_every_bfloat16_value(self, format: str, limit: float | None) -> None:
        for x in (EVERY_BFLOAT16, EVERY_BFLOAT16.float()):
            for dtype in DTYPES:
                check(x, torch.tensor(1.0), format, limit, dtype)
                check(x, torch.tensor(0.37), format, limit, dtype)

    def test_a_million_random_patterns(self, format: str, limit: float | None, threads: int) -> None:
        check(random_patterns(10**6, seed=threads), torch.tensor(3.7), format, limit, torch.bfloat16)

    def test_ties_and_boundaries(self, format: str, limit: float | None) -> None:
        for dtype in DTYPES:
            check(ties_and_boundaries(format), torch.tensor(1.0), format, limit, dtype)

    def test_a_scale_for_every_row(self, format: str, limit: float | None, threads: int) -> None:
        for rows, columns in ((1, 7), (5, 1), (77, 300), (9, 8193), (40, 512)):
            inv_scale = torch.rand(rows, 1, generator=torch.Generator().manual_seed(rows)) * 40 + 0.1
            check(random_patterns(rows * columns).view(rows, columns), inv_scale, format, limit, torch.float32)
            check(torch.randn(rows, columns).bfloat16(), inv_scale, format, limit, torch.bfloat16)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("inv_scale", [0.0, 1e-42, 1e30, float("inf"), float("nan"), -2.5])
def test_scales_of_any_kind(inv_scale: float, format: str) -> None:
    """Also those that `scale_from_amax` never gives."""
    for x in (torch.tensor([0.0, -0.0, 1.0, -3.0] * 20), random_patterns(4096), torch.randn(4096).bfloat16()):
        check(x, torch.tensor(inv_scale), format, None, torch.bfloat16)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_amax_at_the_edge_and_just_beyond(format: str, dtype: torch.dtype) -> None:
    """Up to the edge a row is rounded in vectors; one value beyond it, and all of the row is done again."""
    for limit in (None, 7.0):
        edge = min(limit or FORMATS[format].max_finite, FORMATS[format].max_finite)
        for largest in (edge, edge * (1 + 2**-7), edge * 1.25, edge * 2):
            for sign in (1, -1):
                x = torch.randn(3000, generator=torch.Generator().manual_seed(0)).clamp(-1, 1).to(dtype)
                x[1234] = sign * largest
                check(x, torch.tensor(1.0), format, limit, dtype)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 8191, 8192, 8193, 16384, 16385, 3 * 8192 + 5])
def test_sizes_around_pieces_and_threads(size: int, threads: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 2**14
    check(x, torch.tensor(1.5), "hif8", None, torch.float32)
    for blocked in (None, passes.pack_bits(x.abs() > 2**14)):
        scaled = scale_gradient(x, torch.tensor(0.3), blocked, torch.bfloat16)
        assert torch.equal(scaled, passes._scale_gradient_reference(x, torch.tensor(0.3), blocked, torch.bfloat16))


def test_scalars_and_inputs_that_are_not_contiguous() -> None:
    for x in (
        torch.tensor(3.3),
        torch.randn(70, 50).t(),
        torch.randn(6, 50, 8)[:, ::3],
        torch.randn(5, 1).expand(5, 9),
    ):
        check(x, torch.tensor(1.7), "fp8_e4m3", 3.0, torch.float32)


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_amax_and_nan_in_the_values(worst: float) -> None:
    x = torch.randn(20_000)
    x[[3, 19_000]] = torch.tensor([float("inf"), worst])
    for format, grid in GRIDS.items():
        result = quantize(x, torch.tensor(1.0), grid, None, values=torch.float32)
        assert bits(result.amax) == bits(torch.tensor(worst).abs())
        assert result.values is not None
        assert torch.equal(result.values[19_000], round_to_format(torch.tensor(worst), format)) or worst != worst
        assert result.values[19_000].isnan() == (worst != worst)


def test_only_what_is_asked_for_is_made() -> None:
    result = quantize(torch.randn(9, 9), torch.tensor(1.0), GRIDS["int8"], None, values=None, codes=True)
    assert result.values is None
    assert result.blocked is None
    assert result.codes is not None
    assert result.codes.dtype == torch.int8


def test_float16_runs_on_the_reference() -> None:
    x = torch.randn(4, 4)
    result = quantize(x, torch.tensor(1.0), GRIDS["hif8"], None, values=torch.float16)
    assert_same(result, passes._quantize_reference(x, torch.tensor(1.0), "hif8", None, torch.float16, False, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_codes_give_back_the_values_they_came_with(format: str, dtype: torch.dtype) -> None:
    x = random_patterns(50_000)
    result = quantize(x, torch.tensor(1.0), GRIDS[format], None, values=dtype, codes=True)
    assert result.codes is not None
    decoded = codes_to_grid(result.codes, GRIDS[format], dtype)
    assert torch.equal(bits(decoded), bits(result.values))
    every = torch.arange(256, dtype=torch.uint8).view(result.codes.dtype)
    assert torch.equal(bits(codes_to_grid(every, GRIDS[format], dtype)), bits(decode(every, format)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescale(dtype: torch.dtype, threads: int) -> None:
    y = torch.randn(64, 300).to(dtype)
    for row_scale in (torch.tensor(0.37), torch.rand(64, 1)):
        for column_scale in (torch.tensor(1.7), torch.rand(300)):
            for bias in (None, torch.randn(300)):
                expected = passes._rescale_reference(
                    y, row_scale, column_scale, None if bias is None else bias.to(dtype)
                )
                assert torch.equal(rescale_(y.clone(), row_scale, column_scale, bias), expected)
                columnwise = y.t().contiguous().t()  # not contiguous
                assert torch.equal(rescale_(columnwise, row_scale, column_scale, bias), expected) or bias is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_gradient(dtype: torch.dtype, threads: int) -> None:
    grad = random_patterns(64 * 300).view(64, 300).to(dtype)
    for blocked in (None, passes.pack_bits(torch.rand(64, 300) > 0.5)):
        for out in DTYPES:
            expected = passes._scale_gradient_reference(grad, torch.tensor(0.77), blocked, out)
            assert torch.equal(bits(scale_gradient(grad, torch.tensor(0.77), blocked, out)), bits(expected))
            columnwise = grad.t().contiguous().t()
            assert torch.equal(bits(scale_gradient(columnwise, torch.tensor(0.77), blocked, out)), bits(expected))


def test_bits_are_packed_least_significant_first() -> None:
    mask = torch.tensor([True, False, False, True, False, False, False, False, False, True])
    packed = passes.pack_bits(mask)
    assert packed.tolist() == [0b1001, 0b10]
    assert torch.equal(passes.unpack_bits(packed, mask).bool(), mask)
