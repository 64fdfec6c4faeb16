"""The rule that says of each cause: found, ruled out, or not shown."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qatrun.evaluate.causes import AN_ANSWER, CAUSES, Measured, Measures, causes
from qatrun.evaluate.paired import Interval

PRECISE = 0.002  # half width at 95 % of what is surely measured
HEALTHY = {
    "training": 0.01,
    "whole": 0.004,
    "ptq": 0.006,
    "beyond ptq": -0.002,
    "stale scale": 0.0,
    "granularity": 0.003,
}


def measured(value: float, half: float = PRECISE) -> Measured:
    def interval(confidence: float) -> Interval:
        width = half * (1.0 + 10.0 * max(0.0, confidence - 0.95))
        return value - width, value + width

    return Measured(value, interval)


def measures(
    *, half: float = PRECISE, surprise: float = -2.0, items: dict[str, float] | None = None, **on_text: float
) -> Measures:
    """Of a healthy arm but for these effects, nats a token of both texts; items see nothing unless they are given."""
    effects = HEALTHY | {name.replace("_", " "): value for name, value in on_text.items()}
    texts = {
        name: {"held-out": measured(value, half), "known": measured(value, half)} for name, value in effects.items()
    }
    nothing = {name: measured(0.0, 1.0) for name in effects}
    answers = nothing | {name: measured(value) for name, value in (items or {}).items()}
    points = {name: measured(0.0, 5.0) for name in effects}
    read = {"start": measured(surprise), "twin": measured(surprise)}
    return Measures(texts, {}, points, answers, {}, {}, read, {"start": measured(surprise - 1.0)})


def answers(found: Measures, *, clipped: bool = False) -> dict[str, str]:
    """Cause -> its answer, of those that were measured and are not ruled out."""
    judged = causes(found, clipped=clipped)
    return {name: cause.answer for name, cause in judged.items() if cause.looks and cause.answer != "ruled out"}


def test_a_healthy_arm_rules_every_cause_out() -> None:
    found = causes(measures(), clipped=False)
    assert {name: cause.answer for name, cause in found.items()} == dict.fromkeys(CAUSES, "ruled out")
    assert all(cause.could_hide is None for cause in found.values())


@pytest.mark.parametrize(
    ("effects", "clipped", "expected"),
    [
        ({"training": 0.3}, False, {"forgetting": "found"}),
        ({"whole": 0.08, "beyond_ptq": 0.07}, True, {"saturation": "found"}),
        ({"whole": 0.08, "beyond_ptq": 0.07, "stale_scale": 0.06}, False, {"saturation": "found"}),
        ({"whole": 0.08, "beyond_ptq": 0.07}, False, {"divergence": "found"}),
        ({"whole": 0.5, "ptq": 0.6, "beyond_ptq": -0.1, "granularity": 0.4}, False, {"resolution": "found"}),
        ({"whole": 0.06, "ptq": 0.06, "beyond_ptq": 0.0, "granularity": 0.002}, False, {}),  # what the format costs
        ({"whole": 0.0, "ptq": 0.09, "granularity": 0.08}, False, {}),  # training made up for it
        ({"beyond_ptq": 0.05, "whole": 0.001}, True, {}),  # it clipped, and lost nothing
        (
            {"training": 0.3, "whole": 0.4, "beyond_ptq": 0.4},
            True,
            {"forgetting": "found", "saturation": "found"},
        ),
        ({"surprise": 1.5, "training": 2.0}, False, {"input": "found", "forgetting": "found"}),
    ],
)
def test_the_rule(effects: dict[str, float], clipped: bool, expected: dict[str, str]) -> None:
    assert answers(measures(**effects), clipped=clipped) == expected  # type: ignore[arg-type]


def test_a_text_is_none_to_a_model_that_neither_reads_nor_learns_it_or_is_sure_and_wrong() -> None:
    def found(start: float, twin: float, guessing: float, *, ordered: bool = False, fits: bool = False) -> str:
        base = measures()
        read = {"start": measured(start), "twin": measured(twin)}
        both = Measures(base.texts, {}, base.points, base.nats, {}, {}, read, {"start": measured(guessing)})
        return causes(both, clipped=False, ordered=ordered, fits=fits)["input"].answer

    assert found(1.5, 0.8, -0.3) == "found"  # words at random
    assert found(1.5, -2.0, 0.0) == "ruled out"  # a model that is trained from nothing
    assert found(4.0, -0.5, 2.0) == "found"  # tokens of another tokenizer, learned anew
    assert found(-2.0, -3.0, -4.0) == "ruled out"
    assert found(3.46, 2.35, 0.59, ordered=True) == "ruled out"  # Python, to a model of children's stories
    assert found(4.1, 3.4, 2.8, ordered=True) == "found"  # tokens of another tokenizer, of a text that is one
    assert found(4.1, 3.4, 2.7, ordered=True, fits=True) == "ruled out"  # docstrings, to a model of a closed world
    assert found(1.5, 0.8, -0.3, fits=True) == "found"


def test_without_power_nothing_is_ruled_out_and_the_most_that_could_hide_is_said() -> None:
    found = causes(measures(half=0.1), clipped=True)
    assert [name for name, cause in found.items() if cause.answer == "not shown"] == [
        "forgetting",
        "saturation",
        "resolution",
    ]
    assert found["divergence"].answer == "ruled out"  # something clipped: it would be saturation
    assert found["input"].answer == "ruled out"
    hidden = found["forgetting"].could_hide
    assert hidden == pytest.approx(0.11, abs=0.06)
    assert found["forgetting"].unit == "nats a token"


def test_intervals_hold_together_and_half_of_what_may_be_wrong_goes_to_whole_texts() -> None:
    asked: list[float] = []

    def interval(confidence: float) -> Interval:
        asked.append(1.0 - confidence)
        return -1.0, 1.0

    noted, nothing = Measured(0.0, interval), measured(0.0)
    base = measures()
    texts = base.texts | {"training": {"known": noted}}
    strata = {"training": {"common": noted, "rare": noted}}
    points, nats = (dict.fromkeys(base.points, nothing) | {"training": noted} for _ in range(2))
    causes(Measures(texts, strata, points, nats, {}, {}), clipped=False)
    assert asked == pytest.approx([0.025, *[0.025 / 4] * 4])
    asked.clear()
    causes(Measures({}, {}, points, nats, {}, {}), clipped=False)  # no text
    assert asked == pytest.approx([0.025, 0.025])


def test_either_text_is_enough_to_find_and_both_must_rule_out() -> None:
    found = measures(whole=0.06, beyond_ptq=0.05)
    for text, expected in (("held-out", "found"), ("known", "found")):
        texts = {name: of | {text: measured(0.0)} for name, of in found.texts.items()}
        one = Measures(texts, {}, found.points, found.nats, {}, {})
        assert causes(one, clipped=True)["saturation"].answer == expected
    unsure = {name: of | {"known": measured(0.01, 0.1)} for name, of in measures().texts.items()}
    assert causes(Measures(unsure, {}, {}, {}, {}, {}), clipped=True)["saturation"].answer == "not shown"


def test_items_find_what_text_does_not_show() -> None:
    assert answers(measures(items={"training": 0.4})) == {"forgetting": "found"}
    in_answers = measures(items={"whole": 0.1, "beyond ptq": 0.09})
    assert answers(in_answers, clipped=True) == {"saturation": "found"}
    assert answers(replace(in_answers, answer_tokens=20.0), clipped=True) == {}  # half a hundredth a token


def test_a_third_of_the_tokens_or_of_the_items_may_tell() -> None:
    base = measures()
    rare = Measures(
        base.texts, {"training": {"rare": measured(0.3)}}, base.points, base.nats, {}, {}, base.beyond_frequency
    )
    assert answers(rare) == {"forgetting": "found"}
    unsure = Measures(base.texts, {}, base.points, base.nats, {}, {"training": {"surest": measured(0.3)}})
    assert answers(unsure) == {"forgetting": "found"}
    wide = Measures(
        base.texts, {"training": {"rare": measured(0.1, 0.3)}}, base.points, base.nats, {}, {}, base.beyond_frequency
    )
    assert answers(wide) == {"forgetting": "not shown"}


def test_without_any_text_the_right_answers_decide() -> None:
    effects = tuple(HEALTHY)
    nats = {name: measured(0.001) for name in effects}
    points = {name: measured(0.0, 5.0) for name in effects}
    found = causes(Measures({}, {}, points, nats, {}, {}), clipped=True)
    assert found["saturation"].answer == found["forgetting"].answer == "ruled out"
    assert found["saturation"].looks[-1].unit == AN_ANSWER
    nothing = causes(Measures({}, {}, {}, {}, {}, {}), clipped=True)
    assert {nothing[name].answer for name in ("input", "forgetting", "saturation", "resolution")} == {"not shown"}
    assert nothing["forgetting"].could_hide is None


def test_rare_facts_fade_in_the_text_of_the_answers_before_their_choice_does() -> None:
    base = measures()
    faded = Measures(base.texts, {}, base.points, base.nats, {"training": measured(0.6)}, {}, base.beyond_frequency)
    assert answers(faded) == {"forgetting": "found"}
    usual = Measures(base.texts, {}, base.points, base.nats, {"training": measured(0.08)}, {}, base.beyond_frequency)
    assert answers(usual) == {}
    assert answers(replace(faded, known_tokens=20.0)) == {}  # of twenty tokens, 0.03 each
    assert answers(replace(faded, known_tokens=10.0)) == {"forgetting": "found"}


def test_scales_that_may_not_fit_are_not_ruled_out_because_nothing_clipped() -> None:
    base = measures(whole=0.04, beyond_ptq=0.03)
    unsure = {name: of | {"known": measured(0.02, 0.03)} for name, of in base.texts.items() if name == "stale scale"}
    open_ = Measures({**base.texts, **unsure}, {}, base.points, base.nats, {}, {}, base.beyond_frequency)
    assert answers(open_) == {"divergence": "found", "saturation": "not shown"}


@pytest.mark.parametrize(
    ("training", "clipped", "expected"),
    [
        (0.8, False, {"divergence": "found"}),
        (-3.6, False, {"divergence": "found"}),
        (1.8, False, {"divergence": "not shown"}),  # the line is at 0.09
        (3.6, False, {}),
        (3.6, True, {"saturation": "found"}),
    ],
)
def test_two_runs_that_forget_part_without_any_format(training: float, clipped: bool, expected: dict[str, str]) -> None:
    """0.09 nats a token between a twin and an arm, beside what training lost."""
    found = answers(measures(training=training, whole=0.09, beyond_ptq=0.09), clipped=clipped)
    assert found == expected | ({"forgetting": "found"} if training > 0.0 else {})


@pytest.mark.parametrize("granularity", [0.0, 1.27])  # outlier channels
def test_scales_that_were_never_too_small_are_too_large(granularity: float) -> None:
    found = measures(whole=1.86, ptq=1.42, beyond_ptq=0.44, granularity=granularity, stale_scale=0.49)
    loose = causes(found, clipped=False, loose=True)
    assert {name for name, cause in loose.items() if cause.answer == "found"} == {"resolution"}
    assert causes(found, clipped=False)["saturation"].answer == "found"
    assert causes(found, clipped=True, loose=True)["saturation"].answer == "found"


def test_looking_at_several_measures_widens_their_intervals() -> None:
    """At its threshold, one look in twenty would accuse; many looks together must not more often."""
    looks = causes(measures(), clipped=False)["forgetting"].looks
    alone = measured(HEALTHY["training"]).interval(0.95)
    together = looks[0].intervals[0]
    assert together[0] < alone[0]
    assert together[1] > alone[1]
    assert math.isclose(sum(together) / 2, HEALTHY["training"])
