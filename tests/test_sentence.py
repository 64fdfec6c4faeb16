"""What a diagnosis says of scales: too small, too large, or a grid that is too coarse whatever they are."""

from __future__ import annotations

import pytest

from qatrun.records.diagnosis import Cause, Look, TensorRecord
from qatrun.study.sentence import Said


def found(*effects: str) -> Cause:
    look = Look(
        what="held-out text", effects=list(effects), values=[0.4] * 2, intervals=[[0.3, 0.5]] * 2, threshold=0.02,
        unit="nats a token", decides=True, answer="found",
    )  # fmt: skip
    return Cause(answer="found", looks=[look])


def tensor(name: str, clips: float, fills: float) -> TensorRecord:
    return TensorRecord(
        tensor=name, clip_fraction=clips, overshoot=max(1.1, fills), typical_overshoot=fills, sqnr_db=20.0,
        since_step=None, scale=1.0,
    )  # fmt: skip


COSTS = "quantization costs 0.400 nats a token [0.300, 0.500] of held-out text"


@pytest.mark.parametrize(
    ("cause", "effect", "said"),
    [
        ("saturation", "beyond ptq", (f"scales saturate: {COSTS}", "worst up:input clips 5 % (overshoot up to 1.1x)")),
        ("resolution", "beyond ptq", (f"scales are too large: {COSTS}", "down:input fills 14 % of its range: scales")),
        ("resolution", "granularity", (f"the grid is too coarse: {COSTS}", "worst up:input keeps 20.0 dB: few values")),
    ],
)
def test_what_is_said_of_scales(cause: str, effect: str, said: tuple[str, str]) -> None:
    worst = [tensor("up:input", 0.05, 0.9), tensor("down:input", 0.0, 0.14)]
    text = str(Said("bf16", True, 1e-4, {cause: found("whole", effect)}, {}, {}, {}, worst, None, None))
    assert all(part in text for part in said)
