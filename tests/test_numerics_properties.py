"""What must hold for any number: rounding is idempotent, monotone, symmetric, and errs by half a step at most."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatrun.formats import FORMATS
from qatrun.numerics import round_to_format

each_format = pytest.mark.parametrize("name", FORMATS)
# Magnitudes spread evenly over the exponents that the formats can hold and some beyond either end.
numbers = st.builds(
    lambda mantissa, exponent, sign: sign * math.ldexp(mantissa, exponent),
    st.floats(1.0, 2.0, exclude_max=True, width=32),
    st.integers(-26, 18),
    st.sampled_from([-1.0, 1.0]),
)
quick = settings(max_examples=150, deadline=None, derandomize=True)


def rounded(value: float, name: str) -> float:
    return round_to_format(torch.tensor(value), name).item()


def half_step(magnitude: float, name: str) -> float:
    """Largest rounding error near a magnitude within the format's range, from the formats' definitions."""
    exponent = math.floor(math.log2(magnitude))
    if name == "hif8":
        mantissa_bits = next((bits for bound, bits in ((3, 3), (7, 2), (15, 1)) if abs(exponent) <= bound), 0)
        return max(2.0 ** (exponent - mantissa_bits), 2.0**-22) / 2
    if name == "int8":
        return 0.5
    least_normal_exponent = round(math.log2(FORMATS[name].min_normal))
    mantissa_bits = {"fp8_e4m3": 3, "fp8_e5m2": 2}[name]
    return 2.0 ** (max(exponent, least_normal_exponent) - mantissa_bits) / 2


@each_format
@quick
@given(value=numbers)
def test_idempotent(name: str, value: float) -> None:
    once = rounded(value, name)
    assert rounded(once, name) == once


@each_format
@quick
@given(first=numbers, second=numbers)
def test_monotone(name: str, first: float, second: float) -> None:
    small, large = sorted((first, second))
    assert rounded(small, name) <= rounded(large, name)


@each_format
@quick
@given(value=numbers)
def test_symmetric_in_sign(name: str, value: float) -> None:
    assert rounded(-value, name) == -rounded(value, name)


@each_format
@quick
@given(value=numbers)
def test_error_is_half_a_step_at_most(name: str, value: float) -> None:
    largest = FORMATS[name].max_finite
    inside = max(-largest, min(largest, value))
    assert abs(rounded(inside, name) - inside) <= half_step(abs(inside), name)


@each_format
@quick
@given(value=numbers)
def test_never_past_the_largest_value(name: str, value: float) -> None:
    assert abs(rounded(value, name)) <= FORMATS[name].max_finite
