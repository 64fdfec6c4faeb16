"""What a drop is made of: effects between models that answered the same items and read the same texts.

The models of an arm:

    start   before training                         off     the arm, quantizers off
    twin    trained in BF16                         on      the arm as deployed
    ptq     the twin, quantized after training      fresh   the arm, its scales calibrated anew
            with calibrated scales
    finest  ptq with a scale for each channel of a weight and each token of an input; it reads the texts only

`evaluate.causes` holds the rule that names what did harm. Pure: arrays in, numbers out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from qatrun.evaluate import paired
from qatrun.evaluate.causes import Measured, Measures
from qatrun.evaluate.paired import Flips, Interval, Rate
from qatrun.evaluate.scores import Scores, TaskScore
from qatrun.records.diagnosis import Effect, TextEffect
from qatrun.records.scores import STRATA, TextScore, TextScores

UNKNOWN = (-np.inf, np.inf)  # the interval of a single item

# name -> (from, to); a positive drop is a loss on the way.
EFFECTS: Mapping[str, tuple[str, str]] = {
    "training": ("start", "twin"),
    "whole": ("twin", "on"),
    "ptq": ("twin", "ptq"),
    "beyond ptq": ("ptq", "on"),
    "forgetting": ("start", "off"),
    "quantization": ("off", "on"),
    "stale scale": ("fresh", "on"),
    "granularity": ("finest", "ptq"),
}
HELD_OUT, KNOWN = "held-out", "known"  # texts
KNEW = 0.9  # of the nats of a uniform guess
THIRDS = ("least sure", "half sure", "surest")  # of the items, by how likely the start model's choice was to it


@dataclass(frozen=True)
class Models:
    """What the models of an arm did.

    Attributes:
        scores: model -> its answers; `texts`: model -> what it read.
    """

    scores: Mapping[str, Scores]
    texts: Mapping[str, TextScores]

    def effects(self, tasks: tuple[str, ...] | None = None) -> list[Effect]:
        """Every effect between models that answered the same items, over the items that both answered.

        Args:
            tasks: pooled; None: all.
        """
        return [self._effect(name, pairs) for name, pairs in self._answers(tasks)]

    def text_effects(self) -> dict[str, dict[str, TextEffect]]:
        """Effect -> text that both of its models read -> what was lost on it."""
        return {name: {text: _text_effect(*pair) for text, pair in pairs.items()} for name, pairs in self._read.items()}

    def measures(self) -> Measures:
        """Every effect by every measure, for the rule of causes."""
        answers = dict(self._answers(None))
        read = self._read
        return Measures(
            texts={name: {text: _measured(rise(*pair)) for text, pair in of.items()} for name, of in read.items()},
            strata={
                name: {stratum: _measured(rise(*of[KNOWN], stratum=number)) for number, stratum in enumerate(STRATA)}
                for name, of in read.items()
                if KNOWN in of
            },
            points={name: _points(pairs.flips) for name, pairs in answers.items()},
            nats={name: _mean(pairs.nats) for name, pairs in answers.items()},
            answers={name: _mean(pairs.text_nats[pairs.known]) for name, pairs in answers.items() if pairs.known.any()},
            answer_tokens=max((pairs.answer_tokens for pairs in answers.values()), default=0.0),
            known_tokens=max((pairs.known_tokens for pairs in answers.values()), default=0.0),
            by_confidence={
                name: {THIRDS[n]: _mean(pairs.nats[pairs.third == n]) for n in np.unique(pairs.third) if n >= 0}
                for name, pairs in answers.items()
            },
            knew=self._knew,
            beyond_frequency={name: _beyond(score, score.entropy) for name, score in self._held_out.items()},
            beyond_guessing={name: _beyond(score, score.uniform) for name, score in self._held_out.items()},
        )

    def nats(self, text: str) -> dict[str, float]:
        """Model -> nats a token of a text, of those that read it."""
        return {name: found.texts[text].mean for name, found in self.texts.items() if text in found.texts}

    @cached_property
    def _read(self) -> dict[str, dict[str, tuple[TextScore, TextScore]]]:
        """Effect -> text -> what its two models made of it."""
        return {
            name: {
                text: (before, after)
                for text, before in self.texts[source].texts.items()
                if (after := self.texts[target].texts.get(text)) is not None and after.text == before.text
            }
            for name, (source, target) in EFFECTS.items()
            if source in self.texts and target in self.texts
        }

    def _answers(self, tasks: tuple[str, ...] | None) -> Iterator[tuple[str, _Pairs]]:
        for name, (source, target) in EFFECTS.items():
            if source in self.scores and target in self.scores:
                before, after = self.scores[source].tasks, self.scores[target].tasks
                yield name, _Pairs.of([(before[task], after[task]) for task in tasks or before])

    def _effect(self, name: str, pairs: _Pairs) -> Effect:
        source, target = EFFECTS[name]
        low, high = paired.drop_interval(pairs.flips)
        of_text = self._read.get(name, {}).get(HELD_OUT)
        return Effect(
            name=name,
            source=source,
            target=target,
            drop_pp=100 * pairs.flips.drop,
            ci95_pp=[100 * low, 100 * high],
            loglikelihood=float(pairs.nats.mean()),
            ci95_loglikelihood=list(paired.t_interval(pairs.nats) or UNKNOWN),
            text_loglikelihood=float(pairs.text_nats.mean()) / pairs.answer_tokens,
            ci95_text_loglikelihood=list(paired.t_interval(pairs.text_nats / pairs.answer_tokens) or UNKNOWN),
            log_perplexity=None if of_text is None else rise(*of_text).mean,
        )

    @property
    def _knew(self) -> bool:
        """Whether the start model read the known text better than a guess; true where it read none."""
        known = self.texts["start"].texts.get(KNOWN) if "start" in self.texts else None
        return known is None or knew(known)

    @property
    def _held_out(self) -> dict[str, TextScore]:
        return {name: found.texts[HELD_OUT] for name, found in self.texts.items() if HELD_OUT in found.texts}


@dataclass(frozen=True)
class _Pairs:
    """Items that two models answered, in one order.

    Attributes:
        correct, correct_after: [num_items] bool.
        nats: [num_items], lost of the right answer's log-probability among its choices.
        text_nats: [num_items], lost of the right answer's own text.
        third: [num_items], of THIRDS; -1 in a task without choices.
        known: [num_items] bool, of a task that the first model surely answers better than by chance.
        answer_tokens: of an answer of mean length; `known_tokens`: of those of the known tasks, 0 where there is none.
    """

    correct: npt.NDArray[np.bool_]
    correct_after: npt.NDArray[np.bool_]
    nats: npt.NDArray[np.float64]
    text_nats: npt.NDArray[np.float64]
    third: npt.NDArray[np.int64]
    known: npt.NDArray[np.bool_]
    answer_tokens: float
    known_tokens: float

    @classmethod
    def of(cls, tasks: list[tuple[TaskScore, TaskScore]]) -> _Pairs:
        parts = zip(*(_in_one_order(*pair) for pair in tasks), strict=True)
        correct, after, nats, text_nats, third, known = (np.concatenate(part) for part in parts)
        # Of the items that both answered: one of the two answered no others.
        fewer = [min(pair, key=lambda score: score.num_items) for pair in tasks]
        tokens = _tokens_an_answer(fewer)
        of_known = _tokens_an_answer(
            [each for each, (before, _) in zip(fewer, tasks, strict=True) if _beats_chance(before)]
        )
        return cls(correct, after, nats, text_nats, third, known, tokens, of_known)

    @property
    def flips(self) -> Flips:
        return paired.count_flips(self.correct, self.correct_after)


def _in_one_order(before: TaskScore, after: TaskScore) -> tuple[npt.NDArray[Any], ...]:
    """(correct before, correct after, nats lost among the choices, of the answer's text, third, known), each [num_items]."""
    both = np.intersect1d(before.items.item_id, after.items.item_id, assume_unique=True)
    one, other = before.items.places(both), after.items.places(both)
    return (
        before.items.correct[one],
        after.items.correct[other],
        answer_log_probability(before)[one] - answer_log_probability(after)[other],
        before.items.loglikelihood[one] - after.items.loglikelihood[other],
        _thirds(before.items.choice_loglikelihoods[one]),
        np.full(len(both), _beats_chance(before)),
    )


def _tokens_an_answer(scores: Sequence[TaskScore]) -> float:
    """Of a right answer of mean length; 0 of none."""
    num_items = sum(score.num_items for score in scores)
    return sum(score.num_answer_tokens for score in scores) / num_items if num_items else 0.0


def _beats_chance(score: TaskScore) -> bool:
    """Whether it is surely right more often than one that draws among the choices; not of a task without choices."""
    choices = (~np.isnan(score.items.choice_loglikelihoods)).sum(axis=1)
    by_chance = float((1.0 / choices).mean())
    right = binomtest(int(score.items.correct.sum()), score.num_items, by_chance, alternative="greater")
    return bool(right.pvalue < 0.001)


def _thirds(choices: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """[num_items] of THIRDS: by the likeliest choice, right or wrong, so that the sorting itself favours neither model."""
    if choices.shape[1] == 1:
        return np.full(len(choices), -1)
    likeliest = np.nanmax(choices, axis=1) - _log_sum(choices)
    return np.argsort(np.argsort(likeliest, kind="stable")) * len(THIRDS) // len(choices)


def knew(score: TextScore) -> bool:
    """Whether a text was read better than by a guess."""
    return score.mean < KNEW * score.uniform


def accuracies(models: Mapping[str, Scores], task: str) -> dict[str, float]:
    """Model -> accuracy on the items of a task that all of them answered."""
    items = {name: scores.tasks[task].items for name, scores in models.items()}
    common = reduce(np.intersect1d, (of_model.item_id for of_model in items.values()))
    return {name: float(of_model.correct[of_model.places(common)].mean()) for name, of_model in items.items()}


def answer_log_probability(score: TaskScore) -> npt.NDArray[np.float64]:
    """[num_items] nats: of the right answer among the item's choices; of its text where there are no others."""
    choices = score.items.choice_loglikelihoods
    if choices.shape[1] == 1:
        return score.items.loglikelihood
    return score.items.loglikelihood - _log_sum(choices)


def _log_sum(choices: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total: npt.NDArray[np.float64] = np.logaddexp.reduce(np.where(np.isnan(choices), -np.inf, choices), axis=1)
    return total


def rise(before: TextScore, after: TextScore, stratum: int | None = None) -> Rate:
    """Nats a token that the second model needs more than the first on one text, of one stratum or of all."""
    lost = np.array(after.nats) - np.array(before.nats)
    sizes = np.array(before.num_targets)
    chosen = slice(None) if stratum is None else slice(stratum, stratum + 1)
    return Rate.of(lost[:, chosen].sum(axis=1), sizes[:, chosen].sum(axis=1))


def _text_effect(before: TextScore, after: TextScore) -> TextEffect:
    rate = rise(before, after)
    strata = {name: rise(before, after, number) for number, name in enumerate(STRATA)}
    together = 1.0 - 0.05 / len(STRATA)
    return TextEffect(
        rise=rate.mean,
        ci95=list(rate.interval()),
        num_tokens=int(np.sum(before.num_targets)),
        strata={name: [of.mean, *of.interval(together)] for name, of in strata.items()},
    )


def nats_a_token(score: TextScore) -> Rate:
    """What a model takes on a text."""
    return Rate.of(np.sum(score.nats, axis=1), np.sum(score.num_targets, axis=1))


def _beyond(score: TextScore, nats: float) -> Measured:
    rate = nats_a_token(score)

    def interval(confidence: float) -> Interval:
        low, high = rate.interval(confidence)
        return low - nats, high - nats

    return Measured(rate.mean - nats, interval)


def _measured(rate: Rate) -> Measured:
    return Measured(rate.mean, rate.interval)


def _points(flips: Flips) -> Measured:
    def interval(confidence: float) -> Interval:
        low, high = paired.drop_interval(flips, confidence=confidence)
        return 100 * low, 100 * high

    return Measured(100 * flips.drop, interval)


def _mean(nats: npt.NDArray[np.float64]) -> Measured:
    return Measured(float(nats.mean()), partial(_mean_interval, nats))


def _mean_interval(nats: npt.NDArray[np.float64], confidence: float) -> Interval:
    return paired.t_interval(nats, confidence=confidence) or UNKNOWN
