"""What did harm: each cause found, ruled out, or not shown, from the effects between models.

A *look* is one measure of a cause: an effect on a text or on the items, with an interval and a threshold above which it
matters. Intervals of all looks at a cause hold together at 95 % (Bonferroni), so that looking at several accuses nobody;
half of what may be wrong goes to the looks at whole texts, which see most.

    found       some look lies above its threshold with the whole interval
    ruled out   every look that decides lies below it with the whole interval
    not shown   neither: the upper end says how much could hide

Text decides, and choices can only find: 8,000 tokens see 0.02 nats a token where 200 items see nothing. Where a study has no
text, the right answers' log-probability decides in its place. Thresholds, in nats a token of text:

    input         start and twin, above the entropy of the text's own token frequencies: a model that can read a text, or has
                  learned to, does better than to guess by frequency, so this is none (the wrong data); but not where its
                  words follow each other as words do, for then it may just be far from all that the model knows. Or start,
                  1.0 above ln(vocabulary): only who is sure of other tokens does so much worse than any guess (another
                  tokenizer: 2.8 and more, measured on four models); but not where the words do follow and the tokenizer
                  is known to be the model's (to a model of a closed world, PyTorch's docstrings are 2.7 above)
    forgetting    start -> twin on text that the start model knew: 0.04, so that 0.05 is found; in each third of its tokens
                  by frequency three times as much, as if all of it fell there. Who only guessed knew nothing to forget
    saturation    twin -> on and ptq -> on, 0.02: beyond what the format costs these weights with fitting scales. It is
                  named where a tensor clipped, or where fresh scales cure it
    divergence    the same where nothing clipped, and beyond a twentieth of what training itself lost there: two runs that
                  forget part by up to 4 % of it in formats that cost nothing (measured: 55 arms)
    resolution    twin -> on and finest -> ptq, 0.04: beyond what the format costs where no value shares its scale with
                  more than a row. Or what fresh scales cure where the scales were never too small: then they are too large

Items find in percentage points, and in nats of the right answer among its choices, all items together and by thirds of how
sure the start model was. Of tasks that the model surely answers better than by chance, the right answers' own text decides
too, in nats an answer: forgetting 0.10, saturation and divergence 0.04. Rare facts fade there before their choice does. What
is said of an answer is a sum over its tokens: no line is stricter than that of text for as many.

Pure: arrays in, records out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qatrun.evaluate.paired import Bounds
from qatrun.records.diagnosis import Cause, Look
from qatrun.records.values import Answer

CAUSES = ("input", "forgetting", "saturation", "resolution", "divergence")
LEVEL = 0.05


class Measured(NamedTuple):
    """An effect by one measure."""

    value: float
    interval: Bounds


class Thresholds(NamedTuple):
    """Above which an effect matters."""

    text: float
    stratum: float
    pp: float
    nats: float
    answer: float = math.inf


FORGETTING = Thresholds(text=0.04, stratum=0.12, pp=3.0, nats=0.10, answer=0.10)
BEYOND_PTQ = Thresholds(text=0.02, stratum=0.15, pp=1.0, nats=0.02, answer=0.04)
RESOLUTION = Thresholds(text=0.04, stratum=0.15, pp=1.0, nats=0.04)

SURE_AND_WRONG = 1.0  # nats a token
PARTING = 0.05  # of what training lost

A_TOKEN, AN_ANSWER, POINTS = "nats a token", "nats an answer", "pp"


@dataclass(frozen=True)
class Measures:
    """Every effect by every measure; what was not measured is missing.

    Attributes:
        texts: effect -> text -> nats a token; `strata`: effect -> stratum of the known text -> the same.
        points: effect -> accuracy lost over all items, percentage points.
        answers: effect -> nats of the right answer's own text, an answer, of tasks that the first model knows.
        nats: effect -> of the right answer among its choices; `by_confidence`: effect -> third of the items -> the same.
        beyond_frequency, beyond_guessing: model -> nats a token of held-out text, less the entropy of the text's token
            frequencies, or less ln(vocabulary).
        knew: whether the start model does better than to guess on the text it is said to have known.
        answer_tokens: of a right answer of mean length; `known_tokens`: the same of tasks that the first model knows.
    """

    texts: Mapping[str, Mapping[str, Measured]]
    strata: Mapping[str, Mapping[str, Measured]]
    points: Mapping[str, Measured]
    nats: Mapping[str, Measured]
    answers: Mapping[str, Measured]
    by_confidence: Mapping[str, Mapping[str, Measured]]
    beyond_frequency: Mapping[str, Measured] = field(default_factory=dict)
    beyond_guessing: Mapping[str, Measured] = field(default_factory=dict)
    knew: bool = True
    answer_tokens: float = 0.0
    known_tokens: float = 0.0


def causes(
    measures: Measures, *, clipped: bool, loose: bool = False, ordered: bool = False, fits: bool = False
) -> dict[str, Cause]:
    """What each cause of CAUSES did.

    Args:
        clipped: whether training recorded a tensor that clipped.
        loose: whether it recorded that no scale was ever too small.
        ordered: whether the words of the held-out text are known not to follow each other at random.
        fits: whether the tokenizer is known to be the start model's.
    """
    both = ("whole", "beyond ptq")
    beyond = _judge(_quantization_looks(measures, BEYOND_PTQ, both, both))
    fresh = _judge(_quantization_looks(measures, BEYOND_PTQ, ("stale scale",), ("stale scale",)))
    coarse = _judge(_quantization_looks(measures, RESOLUTION, ("whole", "granularity"), ("whole", "ptq")))
    elsewhere = Cause(answer="ruled out")
    saturation, divergence = beyond, elsewhere
    if not clipped and fresh.answer != "found":
        saturation = beyond if beyond.answer == "ruled out" else fresh
        divergence = _judge(_quantization_looks(measures, BEYOND_PTQ, both, both, PARTING))
    elif not clipped and loose:
        saturation, coarse = elsewhere, coarse if coarse.answer == "found" else beyond
    return {
        "input": elsewhere if ordered and fits else _judge(_input_looks(measures, ordered)),
        "forgetting": _judge(_forgetting_looks(measures)) if measures.knew else elsewhere,
        "saturation": saturation,
        "resolution": coarse,
        "divergence": divergence,
    }


@dataclass(frozen=True)
class _Look:
    what: str
    effects: tuple[str, ...]
    measured: Sequence[Measured]
    threshold: float
    unit: str
    decides: bool = False
    of_text: bool = False  # of all its tokens


def _input_looks(measures: Measures, ordered: bool) -> Iterator[_Look]:
    read, models = measures.beyond_frequency, ("start", "twin")
    if not ordered and all(model in read for model in models):
        what = "held-out text, over token frequency"
        yield _Look(what, models, [read[model] for model in models], 0.0, A_TOKEN, decides=True)
    if (start := measures.beyond_guessing.get("start")) is not None:
        yield _Look("held-out text, over any guess", ("start",), [start], SURE_AND_WRONG, A_TOKEN, decides=True)


def _forgetting_looks(measures: Measures) -> Iterator[_Look]:
    effect, limits = "training", FORGETTING
    known = measures.texts.get(effect, {}).get("known")
    if known is not None:
        yield _Look("text it knew", (effect,), [known], limits.text, A_TOKEN, decides=True, of_text=True)
        for stratum, measured in measures.strata.get(effect, {}).items():
            what = f"{stratum} tokens of text it knew"
            yield _Look(what, (effect,), [measured], limits.stratum, A_TOKEN, decides=True)
    yield from _item_looks(measures, limits, (effect,), decides=known is None)
    for third, measured in measures.by_confidence.get(effect, {}).items():
        yield _Look(f"items it was {third} of", (effect,), [measured], _of_choices(measures, limits), AN_ANSWER)


def _quantization_looks(
    measures: Measures, limits: Thresholds, on_text: tuple[str, ...], on_items: tuple[str, ...], parting: float = 0.0
) -> Iterator[_Look]:
    """
    Args:
        parting: share of what training lost by the same measure that a line is raised to.
    """
    has_text = False
    for text, what in (("held-out", "held-out text"), ("known", "text it knew")):
        found = [measures.texts.get(effect, {}).get(text) for effect in on_text]
        measured = [each for each in found if each is not None]
        if len(measured) == len(on_text):
            has_text = True
            line = max(limits.text, parting * _lost(measures.texts.get("training", {}), text))
            yield _Look(what, on_text, measured, line, A_TOKEN, decides=True, of_text=True)
    yield from _item_looks(measures, limits, on_items, parting, decides=not has_text)


def _lost(measured: Mapping[str, Measured], name: str) -> float:
    return measured[name].value if name in measured else 0.0


def _item_looks(
    measures: Measures, limits: Thresholds, effects: tuple[str, ...], parting: float = 0.0, *, decides: bool
) -> Iterator[_Look]:
    def look(what: str, of: Mapping[str, Measured], limit: float, unit: str, decides: bool) -> _Look:
        line = max(limit, parting * _lost(of, "training"))
        return _Look(what, effects, [of[effect] for effect in effects], line, unit, decides)

    if all(effect in measures.points for effect in effects):
        yield look("accuracy", measures.points, limits.pp, POINTS, decides=False)
        if limits.answer < math.inf and all(effect in measures.answers for effect in effects):
            limit = max(limits.answer, limits.text * measures.known_tokens)
            yield look("the right answers' own text", measures.answers, limit, AN_ANSWER, decides=True)
        yield look("right answers", measures.nats, _of_choices(measures, limits), AN_ANSWER, decides)


def _of_choices(measures: Measures, limits: Thresholds) -> float:
    return max(limits.nats, limits.text * measures.answer_tokens)


def _judge(looks: Iterable[_Look]) -> Cause:
    taken = list(looks)
    records = [_record(look, 1.0 - _level(look, taken)) for look in taken]
    deciding = [look for look in records if look.decides]
    if any(look.answer == "found" for look in records):
        answer: Answer = "found"
    elif deciding and all(look.answer == "ruled out" for look in deciding):
        answer = "ruled out"
    else:
        answer = "not shown"
    if answer != "not shown":
        return Cause(answer=answer, looks=records)
    bounded = [look for look in deciding if look.answer != "ruled out" and _least(look) < math.inf]
    widest = max(bounded, key=_least, default=None)
    if widest is None:
        return Cause(answer=answer, looks=records)
    return Cause(answer=answer, could_hide=_least(widest), unit=widest.unit, looks=records)


def _level(look: _Look, looks: Sequence[_Look]) -> float:
    """How often this look may be wrong: half of LEVEL is shared by those at whole texts, and half by the others."""
    alike = [other for other in looks if other.of_text == look.of_text]
    return LEVEL / len(looks) if len(alike) == len(looks) else LEVEL / 2 / len(alike)


def _least(look: Look) -> float:
    """The upper end of that one of its effects which leaves least open: all of them must matter."""
    return min(high for _, high in look.intervals)


def _record(look: _Look, confidence: float) -> Look:
    intervals = [measured.interval(confidence) for measured in look.measured]
    if all(low > look.threshold for low, _ in intervals):
        answer: Answer = "found"
    else:
        answer = "ruled out" if any(high < look.threshold for _, high in intervals) else "not shown"
    return Look(
        what=look.what,
        effects=list(look.effects),
        values=[measured.value for measured in look.measured],
        intervals=[list(interval) for interval in intervals],
        threshold=look.threshold,
        unit=look.unit,
        decides=look.decides,
        answer=answer,
    )
