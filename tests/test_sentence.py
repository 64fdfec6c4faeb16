"""What a diagnosis says of scales that do not fit: too small, or too large."""

from __future__ import annotations

import pytest

from qatrun.records.diagnosis import Cause, Look, TensorRecord
from qatrun.study.sentence import Said

FOUND = Look(
    what="held-out text", effects=["whole"], values=[0.4], intervals=[[0.3, 0.5]], threshold=0.02, unit="nats a token",
    decides=True, answer="found",
)  # fmt: skip


def tensor(name: str, clips: float, fills: float) -> TensorRecord:
    return TensorRecord(
        tensor=name, clip_fraction=clips, overshoot=max(1.1, fills), typical_overshoot=fills, sqnr_db=20.0,
        since_step=None, scale=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("clips", "alarms", "said"),
    [
        (0.0, {}, "scales do not fit: quantization costs 0.400 nats a token [0.300, 0.500] of held-out text"),
        (
            0.0,
            {},
            "nothing clips, and down:input fills 14 % of its range: scales stand for an amax of long ago; shorten",
        ),
        (0.05, {}, "scales saturate: quantization costs 0.400 nats a token"),
        (0.05, {}, "worst up:input clips 5 % (overshoot up to 1.1x)"),
        (0.0, {"saturation": 30}, "scales saturate: quantization costs 0.400 nats a token"),
    ],
)
def test_scales_that_do_not_fit_are_too_small_or_too_large(clips: float, alarms: dict[str, int], said: str) -> None:
    worst = [tensor("up:input", clips, 0.9), tensor("down:input", 0.0, 0.14)]
    causes = {"saturation": Cause(answer="found", looks=[FOUND])}
    assert said in str(Said("bf16", True, 1e-4, causes, {}, {}, alarms, worst, None, None))
