"""Paired statistics against independent computation, and the coverage that the interval promises."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import bootstrap, norm, ttest_1samp

from qatrun.evaluate.paired import (
    Bounds,
    Flips,
    Rate,
    count_flips,
    detectable_drop,
    drop_interval,
    items_to_settle,
    judge,
    mcnemar_p,
    paired_bootstrap,
    standard_deviation,
    t_interval,
    tango_interval,
    worst_verdict,
)

Z = 1.959963984540054


def test_flips_are_counted_each_way() -> None:
    twin = np.array([1, 1, 1, 0, 0, 1], dtype=bool)
    arm = np.array([1, 0, 0, 1, 0, 1], dtype=bool)
    flips = count_flips(twin, arm)
    assert (flips.to_wrong, flips.to_right, flips.num_items) == (2, 1, 6)
    assert flips.drop == pytest.approx(twin.mean() - arm.mean())
    assert flips.discordance == 0.5


@pytest.mark.parametrize(("to_wrong", "to_right"), [(0, 0), (1, 0), (5, 0), (0, 6), (7, 3), (12, 12), (40, 21)])
def test_mcnemar_is_the_exact_binomial_test(to_wrong: int, to_right: int) -> None:
    n = to_wrong + to_right
    weights = [math.comb(n, k) for k in range(n + 1)]
    as_rare = sum(weight for weight in weights if weight <= weights[to_wrong])
    assert mcnemar_p(Flips(to_wrong, to_right, 1000)) == pytest.approx(as_rare / 2**n)


def test_bootstrap_agrees_with_resampling_item_by_item() -> None:
    differences = np.repeat([1.0, -1.0, 0.0], [25, 10, 265])
    reference = bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = paired_bootstrap(differences, resamples=20_000)
    one_item = 1 / 300
    assert low == pytest.approx(reference.low, abs=1.01 * one_item)
    assert high == pytest.approx(reference.high, abs=1.01 * one_item)


def test_bootstrap_is_fixed_by_its_seed() -> None:
    differences = np.random.default_rng(0).normal(size=200)
    assert paired_bootstrap(differences, seed=3) == paired_bootstrap(differences, seed=3)
    assert paired_bootstrap(differences, seed=3) != paired_bootstrap(differences, seed=4)


def score_statistic(flips: Flips, delta: float) -> float:
    """Score test of drop = delta with the nuisance probability maximised numerically instead of in closed form."""
    b, c, n = flips.to_wrong, flips.to_right, flips.num_items

    def negative_log_likelihood(q: float) -> float:
        terms = ((b, q + delta), (c, q), (n - b - c, 1 - 2 * q - delta))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

    bounds = (max(0.0, -delta), (1 - delta) / 2)
    q = minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))


@pytest.mark.parametrize(
    "flips", [Flips(1, 0, 50), Flips(3, 0, 200), Flips(9, 4, 120), Flips(2, 11, 90), Flips(300, 250, 5000)]
)
def test_tango_edges_are_where_the_score_test_turns(flips: Flips) -> None:
    low, high = tango_interval(flips)
    assert score_statistic(flips, low) == pytest.approx(Z, abs=2e-3)
    assert score_statistic(flips, high) == pytest.approx(-Z, abs=2e-3)


def test_no_flips_is_not_certainty() -> None:
    n = 1000
    bound = Z**2 / (n + Z**2)
    assert paired_bootstrap(np.zeros(n)) == (0.0, 0.0)
    assert drop_interval(Flips(0, 0, n)) == pytest.approx((-bound, bound))


def test_interval_stays_within_all_right_and_all_wrong() -> None:
    assert drop_interval(Flips(5, 0, 5))[1] == 1.0
    assert drop_interval(Flips(0, 5, 5))[0] == -1.0


def test_interval_mirrors_when_the_models_swap() -> None:
    low, high = tango_interval(Flips(17, 5, 400))
    assert tango_interval(Flips(5, 17, 400)) == pytest.approx((-high, -low))


def test_interval_approaches_the_large_sample_one() -> None:
    flips = Flips(400, 350, 14_042)
    half_width = Z * math.sqrt(flips.discordance - flips.drop**2) / math.sqrt(flips.num_items)
    assert drop_interval(flips) == pytest.approx((flips.drop - half_width, flips.drop + half_width), abs=1e-4)


# Expected flips to wrong and to right; the smaller they are, the harder.
COVERAGE_GRID = [(0.5, 0), (1, 0), (2, 0), (3, 0), (4, 0), (2, 2), (5, 0), (5, 2), (8, 8), (20, 10), (60, 60)]


@pytest.mark.parametrize("num_items", [200, 2000])
@pytest.mark.parametrize("expected_flips", COVERAGE_GRID)
def test_interval_holds_the_truth_19_times_in_20(expected_flips: tuple[float, float], num_items: int) -> None:
    shares = np.array([*expected_flips, num_items - sum(expected_flips)]) / num_items
    draws = np.random.default_rng(0).multinomial(num_items, shares, size=1500)[:, :2]
    truth = shares[0] - shares[1]
    covered = 0
    for (to_wrong, to_right), times in zip(*np.unique(draws, axis=0, return_counts=True), strict=True):
        low, high = drop_interval(Flips(int(to_wrong), int(to_right), num_items), resamples=1000)
        covered += int(times) * (low <= truth <= high)
    assert covered / 1500 >= 0.93


@pytest.mark.parametrize(("num_items", "discordance"), [(1000, 0.1), (4000, 0.05), (14_042, 0.02)])
def test_detectable_drop_is_found_4_times_in_5(num_items: int, discordance: float) -> None:
    drop = detectable_drop(num_items, discordance)
    shares = [(discordance + drop) / 2, (discordance - drop) / 2, 1 - discordance]
    to_wrong, to_right, _ = np.random.default_rng(0).multinomial(num_items, shares, size=20_000).T
    rejected = np.abs(to_wrong - to_right) > Z * np.sqrt(to_wrong + to_right)
    assert rejected.mean() == pytest.approx(0.80, abs=0.02)


def test_detectable_drop_of_the_full_mmlu() -> None:
    assert detectable_drop(14_042) == pytest.approx(0.0053, abs=1e-4)


def test_detectable_drop_without_flips_is_a_few_items() -> None:
    drop = detectable_drop(2000, discordance=0.0)
    assert 2000 * drop == pytest.approx((Z + 0.8416) ** 2, abs=0.05)
    assert detectable_drop(3) == 1.0


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.002, 0.009), "within"),
        ((0.011, 0.020), "exceeds"),
        ((-0.002, 0.011), "inconclusive"),
        ((-0.002, 0.010), "inconclusive"),
        ((0.010, 0.020), "inconclusive"),
    ],
)
def test_verdict_needs_the_whole_interval_on_one_side(interval: tuple[float, float], verdict: str) -> None:
    assert judge({"drop": (lambda _: interval, 0.010)}) == {"drop": verdict}


def test_no_more_families_than_single_drops_are_accused_falsely() -> None:
    """Five drops that lie at their budgets, in units of their standard error."""
    rng = np.random.default_rng(0)
    accused = {1: 0, 5: 0}
    for drops in rng.normal(size=(4000, 5)):
        for size in accused:
            family = {str(n): (_normal_bounds(drop), 0.0) for n, drop in enumerate(drops[:size])}
            accused[size] += "exceeds" in judge(family).values()
    assert accused[1] / 4000 == pytest.approx(0.025, abs=0.008)
    assert accused[5] / 4000 == pytest.approx(0.025, abs=0.008)
    uncorrected = 1 - 0.975**5
    assert accused[5] / 4000 < uncorrected / 2


def test_what_is_plain_in_a_family_is_still_found() -> None:
    family = {name: (_normal_bounds(drop), 0.0) for name, drop in (("a", 4.0), ("b", 2.1), ("c", -3.0))}
    assert judge(family) == {"a": "exceeds", "b": "inconclusive", "c": "within"}
    stepped = {name: (_normal_bounds(drop), 0.0) for name, drop in (("a", 4.0), ("b", 2.3))}
    assert judge(stepped) == {"a": "exceeds", "b": "exceeds"}  # once a is out, b stands alone
    assert judge({}) == {}


def _normal_bounds(drop: float) -> Bounds:
    return lambda confidence: (drop - _quantile(confidence), drop + _quantile(confidence))


@cache
def _quantile(confidence: float) -> float:
    return float(norm.ppf((1 + confidence) / 2))


def _judged(interval: tuple[float, float], budget: float) -> str:
    return judge({"drop": (lambda _: interval, budget)})["drop"]


@pytest.mark.parametrize(("to_wrong", "to_right", "settled"), [(60, 52, "within"), (60, 20, "exceeds")])
def test_items_to_settle_do_settle_it_in_four_of_five_studies(to_wrong: int, to_right: int, settled: str) -> None:
    flips, budget = Flips(to_wrong, to_right, 2000), 0.0125
    interval = drop_interval(flips)
    assert _judged(interval, budget) == "inconclusive"
    needed = items_to_settle(flips.num_items, flips.drop, interval, budget)
    assert needed is not None
    shares = [to_wrong / 2000, to_right / 2000, 1 - (to_wrong + to_right) / 2000]
    draws = np.random.default_rng(0).multinomial(needed, shares, size=400)
    verdicts = [_judged(tango_interval(Flips(int(a), int(b), needed)), budget) for a, b, _ in draws]
    assert verdicts.count(settled) / len(verdicts) == pytest.approx(0.8, abs=0.06)


def test_a_rate_over_clusters_is_a_ratio_of_totals_with_the_error_that_a_bootstrap_shows() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 200, size=60)
    sums = sizes * (0.05 + 0.03 * rng.normal(size=60))
    rate = Rate.of(sums, sizes)
    assert rate.mean == pytest.approx(sums.sum() / sizes.sum())
    picks = rng.integers(0, 60, size=(20_000, 60))
    resampled = sums[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    assert rate.stderr == pytest.approx(resampled.std(), rel=0.05)
    even = Rate.of([1.0, 2.0, 3.0], [1, 1, 1])
    assert even.interval() == pytest.approx(t_interval([1.0, 2.0, 3.0]))
    assert even.interval(0.9) == pytest.approx(t_interval([1.0, 2.0, 3.0], confidence=0.9))
    assert (even.num_units, even.num_clusters) == (3, 3)
    assert Rate.of([1.0, 5.0], [2, 0]) == Rate(0.5, math.inf, 1, 2)
    assert Rate.of([1.0], [2]).interval() == (-math.inf, math.inf)


def test_a_rise_that_is_detectable_is_found_in_four_of_five_texts() -> None:
    rng = np.random.default_rng(1)
    sample = rng.normal(size=200)
    smallest = Rate.of((sample - sample.mean()) / sample.std(ddof=1), np.ones(200)).detectable()
    found = [Rate.of(smallest + rng.normal(size=200), np.ones(200)).interval()[0] > 0 for _ in range(2000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


def test_no_number_of_items_settles_a_drop_equal_to_the_budget() -> None:
    assert items_to_settle(1000, 0.01, (-0.01, 0.03), budget=0.01) is None


def test_t_interval() -> None:
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    values = [0.3, -1.2, 0.9, 2.2, 0.1]
    assert t_interval(values, confidence=0.9) == pytest.approx(tuple(ttest_1samp(values, 0).confidence_interval(0.9)))


def test_one_value_has_no_spread() -> None:
    assert t_interval([1.0]) is None
    assert standard_deviation([1.0]) is None
    assert standard_deviation([1.0, 3.0]) == pytest.approx(math.sqrt(2))


def test_worst_verdict() -> None:
    assert worst_verdict(["within", None, "exceeds", "inconclusive"]) == "exceeds"
    assert worst_verdict(["within", "inconclusive"]) == "inconclusive"
    assert worst_verdict([None]) is None
