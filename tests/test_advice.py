"""What a run is told to change is something that it does not do yet."""

from __future__ import annotations

from typing import Any

import pytest

from qatrun import advice
from qatrun.scheme import Scaling, Scheme


@pytest.mark.parametrize(
    ("scaling", "overshoot", "steady", "said"),
    [
        ({"algorithm": "max", "window": 4}, 1.3, True, "widen window (4)"),
        ({"update_interval": 10}, 8.0, False, "update_interval 1"),
        ({"type": "static"}, 3.0, False, "scaling static does not follow"),
        ({}, 1.3, False, "amax grows faster than a window of 64 sees"),
        ({}, 2.0, True, "too small by a steady factor, which no trend explains"),
        ({}, 8.0, True, "too small by a steady factor, which no trend explains"),
        ({}, 8.0, False, "amax jumps above all that a window of 64 has seen"),
    ],
)
def test_the_remedy_is_one_that_the_settings_lack(
    scaling: dict[str, Any], overshoot: float, steady: bool, said: str
) -> None:
    scheme = Scheme("hif8", "per_tensor", 15.0, Scaling(**scaling))
    assert said in advice.against_saturation(scheme, overshoot, steady=steady)


def test_a_wider_edge_is_offered_where_there_is_one() -> None:
    at_target, at_edge = (Scheme("hif8", "per_tensor", 15.0, Scaling(window=4), clip) for clip in ("target", "format"))
    assert "or clip: format" in advice.against_saturation(at_target, 1.3)
    assert "or clip: format" not in advice.against_saturation(at_edge, 1.3)


def test_nothing_is_advised_of_a_tensor_that_the_settings_do_not_know() -> None:
    assert advice.against_saturation(None, 1.3) == "scale estimates do not fit"
