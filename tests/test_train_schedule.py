"""The learning rate and the phase of each step, against tables worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qatrun.quant import Mode
from qatrun.recipe import TrainConfig, WarmupConfig
from qatrun.train.schedule import learning_rate_at, mode_at

NO_RATE_OF_ITS_OWN = WarmupConfig(steps=4)


def rates(warmup: WarmupConfig = NO_RATE_OF_ITS_OWN, **train: Any) -> list[float]:
    config = TrainConfig(**{"steps": 10, "learning_rate": 1.0, "lr_warmup_steps": 2, **train})
    return [learning_rate_at(step, config, warmup) for step in range(config.steps)]


def test_linear() -> None:
    assert rates(lr_schedule="linear") == pytest.approx([1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_cosine() -> None:
    half_root = math.sqrt(0.5)  # cos 45 degrees; the eight steps after the rise are 22.5 degrees apart
    steep, flat = (1 + math.cos(math.pi / 8)) / 2, (1 + math.cos(3 * math.pi / 8)) / 2
    down = [1, steep, (1 + half_root) / 2, flat, 1 / 2, 1 - flat, (1 - half_root) / 2, 1 - steep]
    assert rates(lr_schedule="cosine") == pytest.approx([1 / 2, 1, *down])


def test_constant() -> None:
    assert rates(lr_schedule="constant", min_lr_ratio=0.25) == pytest.approx([1 / 2, *[1] * 9])


def test_the_floor_is_where_the_schedule_ends() -> None:
    values = rates(lr_schedule="linear", min_lr_ratio=0.2, lr_warmup_steps=0)
    assert values == pytest.approx([0.2 + 0.8 * (1 - step / 10) for step in range(10)])


def test_without_a_rise_the_first_step_has_the_peak() -> None:
    assert rates(lr_warmup_steps=0, lr_schedule="cosine")[0] == 1.0


def test_a_rise_over_all_steps_never_falls() -> None:
    assert rates(lr_warmup_steps=10) == pytest.approx([step / 10 for step in range(1, 11)])


def test_a_rate_of_the_bf16_phase_holds_until_its_end_and_rises_too() -> None:
    values = rates(WarmupConfig(steps=4, learning_rate=8.0), lr_schedule="linear")
    assert values[:4] == pytest.approx([4, 8, 8, 8])
    assert values[4:] == rates(lr_schedule="linear")[4:]


Q, O, F = Mode.QUANTIZE, Mode.OBSERVE, Mode.OFF  # noqa: E741


@pytest.mark.parametrize(
    ("switch_step", "observed_steps", "quantizes", "expected"),
    [
        (3, 2, True, [F, O, O, Q, Q, Q]),
        (3, 3, True, [O, O, O, Q, Q, Q]),
        (3, 99, True, [O, O, O, Q, Q, Q]),
        (0, 2, True, [Q, Q, Q, Q, Q, Q]),
        (5, 1, True, [F, F, F, F, O, Q]),
        (4, 2, False, [F, F, O, O, O, O]),  # a trunk ends at its branch point
    ],
)
def test_modes(switch_step: int, observed_steps: int, quantizes: bool, expected: list[Mode]) -> None:
    modes = [
        mode_at(step, switch_step=switch_step, observed_steps=observed_steps, quantizes=quantizes) for step in range(6)
    ]
    assert modes == expected
