"""What a run is told to change is something that it does not do yet."""

from __future__ import annotations

from typing import Any

import pytest

from qatrun import advice
from qatrun.scheme import Scaling, Scheme


@pytest.mark.parametrize(
    ("scaling", "overshoot", "typical", "said"),
    [
        ({"algorithm": "max", "window": 4}, 1.3, 1.3, "widen window (4)"),
        ({"update_interval": 10}, 8.0, 1.0, "update_interval 1"),
        ({"type": "static"}, 3.0, 1.0, "scaling static does not follow"),
        ({}, 1.3, 1.02, "amax grows faster than a window of 64 sees"),
        ({}, 1.3, None, "amax grows faster than a window of 64 sees"),
        ({}, 2.0, 1.7, "too small by a steady factor, which no trend explains"),
        ({}, 2.0, 2.0, "too small by a steady factor, which no trend explains"),
        ({}, 8.0, 7.1, "too small by a steady factor, which no trend explains"),
        ({}, 8.0, 0.9, "amax jumps above all that a window of 64 has seen"),
    ],
)
def test_the_remedy_is_one_that_the_settings_lack(
    scaling: dict[str, Any], overshoot: float, typical: float | None, said: str
) -> None:
    scheme = Scheme("hif8", "per_tensor", 15.0, Scaling(**scaling))
    assert said in advice.against_saturation(scheme, overshoot, typical)


def test_a_wider_edge_is_offered_where_there_is_one() -> None:
    at_target, at_edge = (Scheme("hif8", "per_tensor", 15.0, Scaling(window=4), clip) for clip in ("target", "format"))
    assert "or clip: format" in advice.against_saturation(at_target, 1.3)
    assert "or clip: format" not in advice.against_saturation(at_edge, 1.3)


def test_nothing_is_advised_of_a_tensor_that_the_settings_do_not_know() -> None:
    assert advice.against_saturation(None, 1.3) == "scale estimates do not fit"
