"""Six arms of two models that the rule once judged wrongly: five harmful ones in which it found nothing, and a healthy one
that raised an alarm. Their numbers, sequence by sequence, as `scripts/fault_bench.py` made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatrun.evaluate.attribution import HELD_OUT, KNOWN, Models
from qatrun.evaluate.causes import CAUSES, causes
from qatrun.records.diagnosis import Cause
from qatrun.records.scores import TextScore, TextScores

ARMS = json.loads((Path(__file__).parent / "missed_arms.json").read_text(encoding="utf-8"))
MODELS = ("start", "twin", "ptq", "on", "fresh", "finest")


def diagnosis(arm: dict[str, Any], sequences: slice = slice(None)) -> dict[str, Cause]:
    """By text alone, which is of the kind that the start model knew; questions say nothing to models that guess."""

    def read(model: str) -> TextScores:
        nats, num_targets = arm[model][sequences], arm["num_targets"][sequences]
        guessed = {name: arm[name] for name in ("entropy", "uniform")}
        score = TextScore(text="", nats=nats, num_targets=num_targets, **guessed)
        return TextScores(texts={HELD_OUT: score, KNOWN: score})

    return causes(Models({}, {model: read(model) for model in MODELS}).measures(), clipped=arm["clipped"])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("stories260K own/fp8_e4m3-ruin", {"forgetting"}),
        ("gut3m own/fp8_e4m3-ruin", {"forgetting"}),
        ("stories260K burst/hif8-burst", {"saturation"}),
        ("gut3m burst/fp8_e4m3-burst", {"saturation"}),
        ("stories260K outlier/int8-outlier", {"resolution"}),
        ("stories260K own/hif8-high", set()),
    ],
)
def test_what_was_missed_is_found_and_what_was_accused_is_not(name: str, found: set[str]) -> None:
    answers = {cause: each.answer for cause, each in diagnosis(ARMS[name]).items()}
    assert {cause for cause, answer in answers.items() if answer == "found"} == found
    assert set(answers) == set(CAUSES)
    if not found:
        assert set(answers.values()) == {"ruled out"}


def test_with_too_few_sequences_it_says_how_much_could_hide() -> None:
    few = diagnosis(ARMS["stories260K own/hif8-high"], slice(2))["forgetting"]
    assert few.answer == "not shown"
    assert few.could_hide is not None
    assert few.could_hide > 0.05
