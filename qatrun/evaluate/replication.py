"""Statistics of a study that was run with several training seeds: pure functions of arrays.

Everything here is about a difference between two models, item by item and seed by seed,

    d[s, i] = first model right on item i after training with seed s, minus the same of the second     in {-1, 0, 1}

and about its mean. Two things make that mean uncertain, and they are different things:

    item interval   these seeds, other items of the kind: how much depends on which questions were asked
    seed interval   these items, other seeds: how much depends on the order of the data and other accidents of training

The item interval resamples items (`paired.paired_bootstrap`) of the mean over seeds; the seed interval is Student's t
over the per-seed means. Neither holds what the other measures. Where all seeds flip the same few items, the seed interval
is next to nothing whatever the number of items; where seeds differ, the item interval is too narrow by any factor. In a
simulation of 27 cases, 300 runs each (0.5 to 30 % of 2,000 items flip, none to nearly all of them the same for every
seed, seeds alike or very different), the worst coverage of a nominal 95 % interval was, with 3 seeds, 9 % for the item
interval and 26 % for the seed interval.

`Difference.interval` therefore holds both: their half widths added in quadrature, as errors of two independent sources
are, each side by itself. In that simulation it covered 90 % or more in every case, with 2, 3, 5 and 10 seeds. Chance on
single answers is in both halves, so it errs on the wide side where neither seeds nor items matter. Its weakness is the t
quantile: 4.3 with 3 seeds, and 12.7 with 2, because a standard deviation over three numbers may be off by a factor of two
or more. An inconclusive answer may then say no more than that the seeds were too few. With one seed there is no seed
interval, and the interval is conditional on that seed.

All quantities are fractions of the items, not percentage points, unless a name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qatrun.errors import MismatchError, Problem
from qatrun.evaluate import paired
from qatrun.evaluate.paired import Interval, Rate, standard_deviation, t_interval
from qatrun.evaluate.scores import Scores
from qatrun.records.scores import TextScore
from qatrun.records.seeds import Answer

Correct = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Difference:
    """Accuracy of one model minus that of another, over seeds.

    Attributes:
        per_seed: one difference for each seed.
        sd: standard deviation over seeds (n - 1 in the denominator); None for one seed.
        items: 95 % interval over items, conditional on these seeds.
        seeds: 95 % interval over seeds, conditional on these items; None for one seed.
        interval: 95 % interval that holds both (see the module); the item interval for one seed.
    """

    per_seed: tuple[float, ...]
    mean: float
    sd: float | None
    items: Interval
    seeds: Interval | None
    interval: Interval

    @property
    def answer(self) -> Answer:
        """Whether the first model is better than the second, as far as the interval tells."""
        low, high = self.interval
        if low > 0.0:
            return "helps"
        return "hurts" if high < 0.0 else "no effect shown"


def difference(first: Correct, second: Correct, confidence: float = 0.95) -> Difference:
    """Compare two models over the same items and seeds.

    Args:
        first, second: [num_seeds, num_items], rows and columns of both in the same order.
        confidence: of the intervals.
    """
    differences = first.astype(np.float64) - second.astype(np.float64)
    per_seed = differences.mean(axis=1)
    items, seeds = _item_interval(first, second, confidence), t_interval(per_seed, confidence=confidence)
    mean = float(per_seed.mean())
    return Difference(
        per_seed=tuple(per_seed.tolist()),
        mean=mean,
        sd=standard_deviation(per_seed),
        items=items,
        seeds=seeds,
        interval=items if seeds is None else _in_quadrature(mean, items, seeds),
    )


@dataclass(frozen=True)
class TextRise:
    """What one model lost against another on one text, over seeds: nats a token.

    Attributes:
        of_text: its mean over the seeds, sequence by sequence.
        per_seed: one value for each seed.
    """

    of_text: Rate
    per_seed: tuple[float, ...]

    def interval(self, confidence: float = 0.95) -> Interval:
        """That holds both sequences and seeds, as `Difference.interval` does."""
        text, seeds = self.of_text.interval(confidence), t_interval(self.per_seed, confidence=confidence)
        return text if seeds is None else _in_quadrature(self.of_text.mean, text, seeds)


def text_rise(first: Sequence[TextScore], second: Sequence[TextScore]) -> TextRise | None:
    """From the first model to the second, one score of each for each seed; None where not all read the same text."""
    if len({score.text for score in (*first, *second)}) != 1:
        return None
    pairs = zip(first, second, strict=True)
    lost = np.array([np.sum(after.nats, axis=1) - np.sum(before.nats, axis=1) for before, after in pairs])
    sizes = np.sum(first[0].num_targets, axis=1)
    return TextRise(Rate.of(lost.mean(axis=0), sizes), tuple((lost.sum(axis=1) / sizes.sum()).tolist()))


def correct_of_seeds(scores: Sequence[Scores], tasks: Sequence[str]) -> Correct:
    """[num_seeds, num_items]: which items of these tasks were answered right, task by task and by item id.

    Args:
        scores: of one arm, one for each seed.
    Raises:
        MismatchError: the seeds answered other items.
    """
    return np.stack([np.concatenate([_in_order(of_seed, scores[0], task) for task in tasks]) for of_seed in scores])


@dataclass(frozen=True)
class LossGap:
    """Training loss of one arm against another's, step by step.

    Attributes:
        ape_percent: mean absolute percentage error, what a loss curve shows at best.
        difference_percent: the same with its sign; below zero where the first arm's loss is lower.
    """

    ape_percent: float
    difference_percent: float


def loss_gap(of_first: Mapping[int, float], of_second: Mapping[int, float]) -> LossGap | None:
    """Compare two records of step -> training loss over the steps that both have; None where there are none."""
    gaps = np.array([100.0 * (of_first[step] / loss - 1.0) for step, loss in of_second.items() if step in of_first])
    return LossGap(float(np.abs(gaps).mean()), float(gaps.mean())) if len(gaps) else None


def _in_order(scores: Scores, reference: Scores, task: str) -> Correct:
    items, expected = scores.tasks[task].items, np.sort(reference.tasks[task].items.item_id)
    if not np.array_equal(np.sort(items.item_id), expected):
        raise MismatchError(Problem("the seeds were not scored on the same items", task))
    return items.correct[items.places(expected)]


def _item_interval(first: Correct, second: Correct, confidence: float) -> Interval:
    """`paired.drop_interval` for one seed. For more, the bootstrap of the mean over seeds, widened where it is shorter
    than what no flip at all in this many items leaves open."""
    if len(first) == 1:
        low, high = paired.drop_interval(paired.count_flips(first[0], second[0]), confidence=confidence)
        return low, high
    of_items = (first.astype(np.float64) - second.astype(np.float64)).mean(axis=0)
    low, high = paired.paired_bootstrap(of_items, confidence=confidence)
    least_low, least_high = paired.tango_interval(paired.Flips(0, 0, len(of_items)), confidence=confidence)
    mean = float(of_items.mean())
    return min(low, mean + least_low), max(high, mean + least_high)


def _in_quadrature(mean: float, *intervals: Interval) -> Interval:
    """An interval as far from the mean, on each side, as independent errors of these sizes add up to."""
    low = math.hypot(*(mean - edge for edge, _ in intervals))
    high = math.hypot(*(edge - mean for _, edge in intervals))
    return mean - low, mean + high
