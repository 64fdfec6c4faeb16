"""Statistics over seeds: by hand, against other implementations, and in a world where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qatrun.errors import MismatchError
from qatrun.evaluate import paired
from qatrun.evaluate.replication import Correct, correct_of_seeds, difference, loss_gap
from qatrun.evaluate.scores import ItemScores, Scores, TaskScore

COVERAGE_TRIALS = 200


def answers(*rows: str) -> Correct:
    """A row of 0 and 1 for each seed."""
    return np.array([[digit == "1" for digit in row] for row in rows])


def scores(item_ids: list[str], correct: list[bool], task: str = "facts") -> Scores:
    n = len(item_ids)
    items = ItemScores(np.array(item_ids), np.array(correct), np.zeros(n), np.zeros((n, 2)))
    return Scores({task: TaskScore(task, "acc", 0, 0, n, items)}, {})


# By hand.


def test_of_one_seed_the_interval_is_that_of_the_comparison() -> None:
    first, second = answers("1" * 60 + "0" * 40), answers("1" * 50 + "0" * 45 + "1" * 5)
    found = difference(first, second)
    assert (found.per_seed, found.mean, found.sd, found.seeds) == (
        (pytest.approx(0.05),),
        pytest.approx(0.05),
        None,
        None,
    )
    assert found.interval == found.items == paired.drop_interval(paired.Flips(10, 5, 100))


def test_every_number_of_two_seeds() -> None:
    first, second = answers("1" * 80 + "0" * 20, "1" * 90 + "0" * 10), answers("1" * 70 + "0" * 30, "1" * 70 + "0" * 30)
    found = difference(first, second)
    assert found.per_seed == pytest.approx((0.1, 0.2))
    assert (found.mean, found.sd) == pytest.approx((0.15, 0.0707107))
    assert found.seeds == pytest.approx((0.15 - 0.05 * 12.7062, 0.15 + 0.05 * 12.7062), rel=1e-5)
    # Per item: ten lost in both seeds, ten in one of them, so the standard error is 0.323 / 10.
    assert found.items == pytest.approx((0.15 - 0.063, 0.15 + 0.063), abs=0.01)
    halves = [found.mean - found.items[0], found.mean - found.seeds[0]] if found.seeds else []
    assert found.interval[0] == pytest.approx(found.mean - math.hypot(*halves))


@pytest.mark.parametrize(
    ("gained", "lost", "answer"),
    [(60, 0, "helps"), (0, 60, "hurts"), (4, 3, "no effect shown"), (0, 0, "no effect shown")],
)
def test_answers(gained: int, lost: int, answer: str) -> None:
    rest = "1" * (1000 - gained - lost)
    found = difference(
        answers(*["1" * gained + "0" * lost + rest] * 3), answers(*["0" * gained + "1" * lost + rest] * 3)
    )
    assert (found.answer, found.mean) == (answer, pytest.approx((gained - lost) / 1000))


def test_no_flips_in_any_seed_are_no_certainty() -> None:
    same = answers(*["1" * 300 + "0" * 100] * 3)
    found = difference(same, same)
    least = paired.tango_interval(paired.Flips(0, 0, 400))
    assert found.items == found.interval == pytest.approx(least)
    assert max(map(abs, found.interval)) > 0.009


def test_loss_gap_has_a_size_and_a_sign() -> None:
    gap = loss_gap({1: 2.2, 2: 1.8, 3: 9.0}, {1: 2.0, 2: 2.0, 4: 1.0})
    assert gap is not None
    assert (gap.ape_percent, gap.difference_percent) == pytest.approx((10.0, 0.0))
    lower = loss_gap({1: 1.5}, {1: 2.0})
    assert lower is not None
    assert lower.difference_percent == pytest.approx(-25.0)
    assert loss_gap({1: 1.0}, {2: 1.0}) is None


# Pairing.


def test_items_are_paired_whatever_their_order() -> None:
    seeds = [scores(["b", "a", "c"], [True, False, False]), scores(["c", "b", "a"], [False, True, True])]
    assert correct_of_seeds(seeds, ["facts"]).tolist() == [[False, True, False], [True, True, False]]


def test_seeds_that_answered_other_items_are_refused() -> None:
    with pytest.raises(MismatchError, match="facts -- the seeds were not scored on the same items"):
        correct_of_seeds([scores(["a", "b"], [True, True]), scores(["a", "c"], [True, True])], ["facts"])


# Whatever the answers.


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_interval_holds_mean_items_and_seeds_and_turns_with_the_sign(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(2, 40)))
    first, second = (data.draw(arrays(np.bool_, shape)) for _ in range(2))
    found, turned = difference(first, second), difference(second, first)
    for low, high in (found.items, found.seeds or found.items):
        assert found.interval[0] <= low + 1e-12
        assert found.interval[1] >= high - 1e-12
    assert found.interval[0] <= found.mean <= found.interval[1]
    assert turned.mean == pytest.approx(-found.mean)
    # The bootstrap of the other direction draws other numbers: an end may lie one item further.
    assert turned.interval == pytest.approx((-found.interval[1], -found.interval[0]), abs=max(0.1, 1.01 / shape[1]))


# Where the truth is known.


def simulated(
    rng: np.random.Generator, num_seeds: int, *, flips: float, shared: float, tilt: float
) -> tuple[Correct, Correct]:
    """Answers of two models to 2,000 items: `flips` of them differ, `shared` of those the same ones for every seed, 65 % of
    them to the worse give or take `tilt` for a seed."""
    fixed, fixed_to_wrong = rng.random(2000) < flips * shared, rng.random(2000) < 0.65
    own = rng.random((num_seeds, 2000)) < flips * (1 - shared)
    share_to_wrong = np.clip(0.65 + tilt * rng.standard_normal((num_seeds, 1)), 0, 1)
    to_wrong = np.where(fixed, fixed_to_wrong, rng.random((num_seeds, 2000)) < share_to_wrong)
    flipped = fixed | own
    return np.where(flipped, to_wrong, True), np.where(flipped, ~to_wrong, True)


@pytest.mark.parametrize(
    ("shared", "tilt", "too_narrow"), [(0.0, 0.0, None), (0.95, 0.0, "seeds"), (0.0, 0.35, "items"), (0.5, 0.1, None)]
)
def test_the_interval_covers_the_truth_where_one_source_alone_does_not(
    shared: float, tilt: float, too_narrow: str | None
) -> None:
    rng = np.random.default_rng(0)
    of_fixed, of_own = 0.2 * shared, (1 - 0.2 * shared) * 0.2 * (1 - shared)
    truth = 0.3 * of_fixed + of_own * (2 * np.clip(rng.normal(0.65, tilt, 100_000), 0, 1).mean() - 1)
    covered = dict.fromkeys(("items", "seeds", "interval"), 0)
    for _ in range(COVERAGE_TRIALS):
        found = difference(*simulated(rng, 3, flips=0.2, shared=shared, tilt=tilt))
        for name in covered:
            low, high = getattr(found, name)
            covered[name] += low <= truth <= high
    assert covered["interval"] >= 0.9 * COVERAGE_TRIALS
    if too_narrow is not None:
        assert covered[too_narrow] <= 0.6 * COVERAGE_TRIALS
