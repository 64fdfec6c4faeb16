"""Scales and the straight-through estimator, against numbers worked out by hand or published."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qatrun.numerics import (
    amax,
    fake_quantize,
    inverse_scale,
    round_to_format,
    saturates,
    scale_from_amax,
)
from qatrun.scheme import Clip, Ste

INF, NAN = math.inf, math.nan


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return torch.randn(400_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("clip", "underestimate", "expected_db"),
    [
        ("format", 1, 31.6),
        ("format", 2, 30.6),
        ("format", 4, 26.9),
        ("format", 16, 25.6),
        ("format", 256, 19.7),
        ("target", 1, 31.6),
        ("target", 2, 25.2),
        ("target", 4, 10.8),
        ("target", 16, 2.3),
    ],
)
def test_sqnr_of_a_gaussian_when_amax_is_underestimated(
    gaussian: Tensor, clip: Clip, underestimate: int, expected_db: float
) -> None:
    # The largest of so many draws lies between 4.5 and 5.1 and moves the clipped figures by 3 dB: these are for 5.0.
    scale = scale_from_amax(torch.tensor(5.0 / underestimate), 15.0)
    x_hat = fake_quantize(gaussian, scale, "hif8", clip=clip, target_amax=15.0)
    sqnr_db = 10 * torch.log10(gaussian.square().sum() / (gaussian - x_hat).square().sum())
    assert sqnr_db.item() == pytest.approx(expected_db, abs=0.6)


# Grid units are x / 0.5. HiF8 around them: step 1/4 in [2, 4), 1/2 in [4, 8), 1 in [8, 16), 4 in [16, 32).
HAND_WORKED = torch.tensor([1.0, -3.1, 7.5, 7.7, 7.75, -8.9, 9.0, 20479.0, -20480.0, 1e9, 0.0])
X_HAT_CLIP_FORMAT = torch.tensor([1.0, -3.0, 7.5, 7.5, 8.0, -8.0, 10.0, 16384.0, -16384.0, 16384.0, 0.0])
X_HAT_CLIP_TARGET = torch.tensor([1.0, -3.0, 7.5, 7.5, 7.5, -7.5, 7.5, 7.5, -7.5, 7.5, 0.0])
PASSES_CLIP_FORMAT = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1])
PASSES_CLIP_TARGET = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("clip", "ste", "x_hat", "passes"),
    [
        ("format", "identity", X_HAT_CLIP_FORMAT, torch.ones(11)),
        ("format", "clipped", X_HAT_CLIP_FORMAT, PASSES_CLIP_FORMAT),
        ("target", "identity", X_HAT_CLIP_TARGET, torch.ones(11)),
        ("target", "clipped", X_HAT_CLIP_TARGET, PASSES_CLIP_TARGET),
    ],
)
def test_values_and_gradients_worked_out_by_hand(clip: Clip, ste: Ste, x_hat: Tensor, passes: Tensor) -> None:
    x = HAND_WORKED.clone().requires_grad_()
    scale = torch.tensor(0.5, requires_grad=True)
    result = fake_quantize(x, scale, "hif8", clip=clip, target_amax=15.0, ste=ste)
    upstream = torch.arange(1.0, 12.0)
    result.backward(upstream)
    assert torch.equal(result.detach(), x_hat)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream * passes)
    assert scale.grad is None


@pytest.mark.parametrize(
    ("name", "last_that_passes", "first_that_saturates"),
    [
        ("hif8", 40959.996, 40960.0),
        ("fp8_e4m3", 464.0, 464.00003),  # a tie that goes down, to 448, whose mantissa is even
        ("fp8_e5m2", 61439.996, 61440.0),
        ("int8", 127.49999, 127.5),
    ],
)
def test_clipped_gradient_ends_exactly_where_values_saturate(
    name: str, last_that_passes: float, first_that_saturates: float
) -> None:
    x = torch.tensor([last_that_passes, -first_that_saturates], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), name, ste="clipped").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0]


def test_a_nan_stays_visible_in_every_format() -> None:
    for name in ("hif8", "fp8_e4m3", "fp8_e5m2", "int8"):
        assert fake_quantize(torch.tensor([NAN]), torch.tensor(2.0), name).isnan().all(), name


def test_scale_arithmetic_is_float32_for_bfloat16_tensors() -> None:
    x = torch.linspace(-3, 3, 1001).to(torch.bfloat16)
    scale = torch.tensor(0.0123)
    q = round_to_format(x.float() * (1 / scale), "hif8")
    x_hat = fake_quantize(x, scale, "hif8")
    assert torch.equal(x_hat, (q * scale).to(torch.bfloat16))
    assert not torch.equal(x_hat, q.to(torch.bfloat16) * scale.to(torch.bfloat16))


@pytest.mark.parametrize("granularity", ["per_channel", "per_token"])
def test_each_row_has_its_own_scale(granularity: str) -> None:
    rows = torch.tensor([[1.0, 0.5], [100.0, 50.0]])
    scale = scale_from_amax(amax(rows, granularity), 8.0)  # type: ignore[arg-type]
    assert torch.equal(scale, torch.tensor([[0.125], [12.5]]))
    assert torch.equal(fake_quantize(rows, scale, "int8"), rows)


def test_target_clip_needs_a_target() -> None:
    with pytest.raises(ValueError, match="target_amax"):
        fake_quantize(torch.ones(1), torch.tensor(1.0), "hif8", clip="target")


def test_amax_shapes_and_values() -> None:
    x = torch.tensor([[[1.0, -5.0], [2.0, 0.0]], [[-0.0, 0.0], [3.0, 4.0]]], dtype=torch.bfloat16)
    assert torch.equal(amax(x, "per_tensor"), torch.tensor(5.0))
    assert torch.equal(amax(x, "per_token"), torch.tensor([[[5.0], [2.0]], [[0.0], [4.0]]]))
    assert torch.equal(amax(x[0], "per_channel"), torch.tensor([[5.0], [2.0]]))


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_amax_shows_what_is_not_finite(bad: float) -> None:
    x = torch.tensor([[1.0, bad], [1.0, 2.0]])
    expected = torch.tensor(abs(bad))
    assert torch.allclose(amax(x, "per_tensor"), expected, equal_nan=True)
    assert torch.allclose(amax(x, "per_token"), torch.tensor([[abs(bad)], [2.0]]), equal_nan=True)


def test_an_amax_that_tells_nothing_keeps_the_previous_scale() -> None:
    amaxes = torch.tensor([30.0, 0.0, -1.0, INF, NAN, 1.5])
    previous = torch.tensor([7.0, 7.1, 7.2, 7.3, 7.4, 7.5])
    assert torch.equal(scale_from_amax(amaxes, 15.0, previous), torch.tensor([2.0, 7.1, 7.2, 7.3, 7.4, 0.1]))
    assert torch.equal(scale_from_amax(amaxes, 15.0), torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 0.1]))


def test_targets_may_differ_per_entry() -> None:
    assert torch.equal(
        scale_from_amax(torch.tensor([30.0, 448.0]), torch.tensor([15.0, 224.0])), torch.tensor([2.0, 2.0])
    )


def test_a_scale_is_rounded_up_to_a_power_of_two_where_asked() -> None:
    amaxes = torch.tensor([15.0, 15.1, 30.0, 30.1, 7.5, 7.6, 0.0])
    expected = torch.tensor([1.0, 2.0, 2.0, 4.0, 0.5, 1.0, 7.0])
    assert torch.equal(scale_from_amax(amaxes, 15.0, torch.tensor(7.0), to_power_of_two=True), expected)
    where = torch.arange(7) % 2 == 1
    mixed = torch.where(where, expected, scale_from_amax(amaxes, 15.0, torch.tensor(7.0)))
    assert torch.equal(scale_from_amax(amaxes, 15.0, torch.tensor(7.0), to_power_of_two=where), mixed)


def test_powers_of_two_stay_normal_exact_in_bfloat16_and_above_what_they_were() -> None:
    amaxes = positive_patterns(100_000)
    free, scale = (scale_from_amax(amaxes, 15.0, to_power_of_two=rounded) for rounded in (False, True))
    assert torch.equal(scale.log2(), free.double().log2().ceil().float())
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(1 / inverse_scale(scale), scale)


def positive_patterns(count: int) -> Tensor:
    """Positive finite float32 numbers, subnormals included, every pattern as likely."""
    return torch.randint(1, 0x7F80_0000, (count,), generator=torch.Generator().manual_seed(0)).int().view(torch.float32)


@pytest.mark.parametrize("target", [15.0, 224.0, 57344.0, 2.0**-22])
def test_scale_and_its_reciprocal_are_always_normal_numbers(target: float) -> None:
    scale = scale_from_amax(positive_patterns(100_000), target)
    for values in (scale, inverse_scale(scale)):
        assert values.isfinite().all()
        assert (values >= torch.finfo(torch.float32).tiny).all()


def test_division_is_correctly_rounded() -> None:
    amaxes = positive_patterns(100_000)
    amaxes = amaxes[(amaxes > 1e-30) & (amaxes < 1e30)]
    scale = scale_from_amax(amaxes, 15.0)
    assert np.array_equal(scale.numpy(), amaxes.numpy() / np.float32(15))
    assert np.array_equal(inverse_scale(scale).numpy(), np.float32(1) / scale.numpy())


@pytest.mark.parametrize(("name", "target"), [("hif8", 15.0), ("hif8", 224.0), ("fp8_e4m3", 448.0), ("int8", 127.0)])
def test_amax_itself_lands_on_the_target_and_does_not_saturate(name: str, target: float) -> None:
    amaxes = positive_patterns(100_000)
    amaxes = amaxes[(amaxes > 1e-30) & (amaxes < 1e30)]
    inv_scale = inverse_scale(scale_from_amax(amaxes, target))
    assert (amaxes * inv_scale > target).any()  # by an ulp: the case this test is about
    assert (round_to_format(amaxes * inv_scale, name, limit=target) == target).all()
    assert not saturates(amaxes * inv_scale, name, target).any()
