"""Statistics of two models that answered the same items: pure functions of arrays and counts.

An item is *discordant* when exactly one of the two models is right. Only discordant items say anything about a
difference: of n items, `to_wrong` are right in the twin and wrong in the arm, `to_right` the other way round, and

    drop = accuracy(twin) - accuracy(arm) = (to_wrong - to_right) / n

A good quantizer flips few items, which is where a bootstrap is too short: where nothing flips it resamples zeros and
claims certainty, and where one flip in n is to be expected its 95% interval holds the truth 6 times in 10.
`drop_interval` is therefore the paired bootstrap, widened where it is shorter than Tango's score interval, whose
coverage holds at few or no flips (with none it reaches z^2 / (n + z^2), about 3.8 of n items, either side).

All quantities here are fractions of the items, not percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, t

from qatrun.records.values import Verdict

Interval = tuple[float, float]
Bounds = Callable[[float], Interval]  # confidence -> two-sided interval

TYPICAL_DISCORDANCE = 0.05
_EDGE = 1.0 - 1e-12


@dataclass(frozen=True)
class Flips:
    """Discordant items of a twin and an arm.

    Attributes:
        to_wrong: items right in the twin and wrong in the arm.
        to_right: items wrong in the twin and right in the arm.
        num_items: all items, concordant ones included.
    """

    to_wrong: int
    to_right: int
    num_items: int

    @property
    def drop(self) -> float:
        return (self.to_wrong - self.to_right) / self.num_items

    @property
    def discordance(self) -> float:
        return (self.to_wrong + self.to_right) / self.num_items


def count_flips(twin_correct: npt.NDArray[np.bool_], arm_correct: npt.NDArray[np.bool_]) -> Flips:
    """Both [num_items], the same items in the same order."""
    return Flips(
        to_wrong=int(np.count_nonzero(twin_correct & ~arm_correct)),
        to_right=int(np.count_nonzero(~twin_correct & arm_correct)),
        num_items=len(twin_correct),
    )


def paired_bootstrap(
    differences: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Two-sided percentile interval of the mean difference, resampling items.

    A resample of n items with replacement is one multinomial draw over the distinct differences (for right-or-wrong
    answers: -1, 0 and 1), which is the same distribution and does not cost n draws.

    Args:
        differences: [num_items], twin minus arm per item.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    num_items = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(num_items, counts / num_items, size=resamples)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(draws @ values / num_items, [tail, 1.0 - tail])
    return float(low), float(high)


def tango_interval(flips: Flips, *, confidence: float = 0.95) -> Interval:
    """Two-sided score interval of the drop: the values that a score test at this confidence does not reject.

    Source: Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998) 891-908.
    """
    z = float(norm.ppf((1.0 + confidence) / 2.0))

    def edge(sign: float) -> float:
        bound = sign * _EDGE
        if sign * _tango_statistic(flips, bound) > -z:
            return sign
        return float(brentq(lambda delta: sign * _tango_statistic(flips, delta) + z, flips.drop, bound))

    return edge(-1.0), edge(1.0)


def _tango_statistic(flips: Flips, delta: float) -> float:
    """Score statistic of the hypothesis drop = delta; falls as delta grows."""
    b, c, n = flips.to_wrong, flips.to_right, flips.num_items
    linear = -b - c + (2 * n - b + c) * delta
    constant = -c * delta * (1.0 - delta)
    share_to_right = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
    variance = n * (2.0 * share_to_right + delta * (1.0 - delta))
    distance = b - c - n * delta
    return distance / math.sqrt(variance) if variance > 0.0 else 0.0


def drop_interval(flips: Flips, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Two-sided interval of the drop: the paired bootstrap's, widened where shorter than `tango_interval`."""
    concordant = flips.num_items - flips.to_wrong - flips.to_right
    differences = np.repeat([1.0, -1.0, 0.0], [flips.to_wrong, flips.to_right, concordant])
    bootstrap = paired_bootstrap(differences, confidence=confidence, resamples=resamples, seed=seed)
    score = tango_interval(flips, confidence=confidence)
    return min(bootstrap[0], score[0]), max(bootstrap[1], score[1])


def standard_deviation(values: npt.ArrayLike) -> float | None:
    """With n - 1 in the denominator; None for a single value."""
    numbers = np.asarray(values, dtype=np.float64)
    return float(numbers.std(ddof=1)) if len(numbers) > 1 else None


def t_interval(values: npt.ArrayLike, *, confidence: float = 0.95) -> Interval | None:
    """Two-sided interval of the mean of independent values, for a normal distribution of unknown variance; None for a
    single value.

    Source: Student, The probable error of a mean, Biometrika 6 (1908) 1-25.
    """
    numbers = np.asarray(values, dtype=np.float64)
    sd = standard_deviation(numbers)
    if sd is None:
        return None
    half = float(t.ppf((1.0 + confidence) / 2.0, len(numbers) - 1)) * sd / math.sqrt(len(numbers))
    return float(numbers.mean()) - half, float(numbers.mean()) + half


@dataclass(frozen=True)
class Rate:
    """A sum over clusters (sequences of a text) for each of the units in them (its tokens), with its standard error.

    Attributes:
        num_clusters: how many have any unit; the interval is Student's t over them, infinite for fewer than two.
        num_units: in all.
    """

    mean: float
    stderr: float
    num_clusters: int
    num_units: int

    @classmethod
    def of(cls, sums: npt.ArrayLike, sizes: npt.ArrayLike) -> Rate:
        """Ratio of the totals; its variance is that of the residuals `sums - mean * sizes`, clusters being independent.

        Args:
            sums, sizes: [num_clusters].
        Source: Cochran, Sampling Techniques (3rd ed., 1977), equation 6.10.
        """
        total, units = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
        total, units = total[units > 0], units[units > 0]
        n, num_units = len(units), int(units.sum())
        mean = float(total.sum() / num_units) if n else 0.0
        if n < 2:
            return cls(mean, math.inf, n, num_units)
        residuals = total - mean * units
        return cls(mean, math.sqrt(n / (n - 1) * float((residuals**2).sum())) / num_units, n, num_units)

    def interval(self, confidence: float = 0.95) -> Interval:
        """Two-sided."""
        if self.num_clusters < 2:
            return -math.inf, math.inf
        half = float(t.ppf((1.0 + confidence) / 2.0, self.num_clusters - 1)) * self.stderr
        return self.mean - half, self.mean + half

    def detectable(self, *, power: float = 0.8, alpha: float = 0.05) -> float:
        """Smallest true mean that a two-sided test of this level finds with this probability."""
        return float(norm.ppf(1.0 - alpha / 2.0) + norm.ppf(power)) * self.stderr


def mcnemar_p(flips: Flips) -> float:
    """Exact two-sided p-value that flips either way are equally likely; 1 where nothing flips.

    Source: McNemar, Psychometrika 12 (1947) 153-157, with the binomial distribution instead of its chi-square limit.
    """
    num_discordant = flips.to_wrong + flips.to_right
    return float(binomtest(flips.to_wrong, num_discordant, 0.5).pvalue) if num_discordant else 1.0


def detectable_drop(
    num_items: int, discordance: float = TYPICAL_DISCORDANCE, *, power: float = 0.8, alpha: float = 0.05
) -> float:
    """Smallest true drop that a two-sided paired test of level `alpha` finds with probability `power`.

    Solves Connor's sample size n = (z_alpha sqrt(d) + z_beta sqrt(d - drop^2))^2 / drop^2 for the drop. A drop cannot
    exceed the discordance d: where d is too small for any drop to be found, it is taken as large as the drop itself.

    Args:
        num_items: items that both models answer.
        discordance: share of items on which they differ, in [0, 1]; the default is a guess for plans made before a run.
    Returns:
        A fraction of the items; 1.0 where the items are too few for any drop.
    Source: Connor, Sample size for testing differences in proportions for the paired-sample design, Biometrics 43
    (1987) 207-211.
    """
    z_alpha, z_beta = float(norm.ppf(1.0 - alpha / 2.0)), float(norm.ppf(power))
    if num_items <= z_alpha**2:
        return 1.0
    root = z_alpha * math.sqrt(num_items) + z_beta * math.sqrt(num_items + z_beta**2 - z_alpha**2)
    drop = math.sqrt(discordance) * root / (num_items + z_beta**2)
    if 0.0 < drop <= discordance:
        return drop
    return float(brentq(lambda d: num_items * d - (z_alpha + z_beta * math.sqrt(1.0 - d)) ** 2, 0.0, 1.0))


def judge(drops: Mapping[str, tuple[Bounds, float]]) -> dict[str, Verdict]:
    """`within` where the whole 95 % interval lies below the budget, `exceeds` where the drop surely lies above it, else
    `inconclusive`.

    Of several drops that all lie at their budgets, one or more is said to exceed it in at most 2.5 % of studies, as of a
    single one: Holm's procedure, in which k drops still open are judged by intervals of confidence 1 - 0.05 / k. All are
    within only where each is, which needs no correction.

    Args:
        drops: name -> (its interval at a confidence, its budget).
    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979)
    65-70.
    """
    exceeding: set[str] = set()
    while len(exceeding) < len(drops):
        left = [name for name in drops if name not in exceeding]
        confidence = 1.0 - 0.05 / len(left)
        found = {name for name in left if drops[name][0](confidence)[0] > drops[name][1]}
        if not found:
            break
        exceeding |= found
    within = {name for name, (bounds, budget) in drops.items() if bounds(0.95)[1] < budget}
    return {name: "exceeds" if name in exceeding else "within" if name in within else "inconclusive" for name in drops}


def worst_verdict(verdicts: Iterable[Verdict | None]) -> Verdict | None:
    """The most severe of those that are known; None where none is."""
    return max((verdict for verdict in verdicts if verdict is not None), key=get_args(Verdict).index, default=None)


def items_to_settle(
    num_items: int, drop: float, interval: Interval, budget: float, *, power: float = 0.8
) -> int | None:
    """About how many items would settle an inconclusive verdict with this probability, were the true drop and the flip
    rate what was observed.

    The interval shrinks as 1/sqrt(n). It fits between drop and budget at n = num_items * (half width / gap)^2, in every
    other study of that size; with a half width of z(0.975) + z(power) standard errors in place of z(0.975), in `power`
    of them.

    Returns:
        More than `num_items`; None where the observed drop equals the budget, which no number of items settles.
    """
    gap = abs(drop - budget)
    if gap == 0.0:
        return None
    half_width = interval[1] - drop if drop < budget else drop - interval[0]
    half_width *= 1.0 + float(norm.ppf(power) / norm.ppf(0.975))
    return max(num_items + 1, math.ceil(num_items * (half_width / gap) ** 2))
