"""What a diagnosis says, in a sentence: what was found, what is ruled out, and how much could hide in the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qatrun import advice
from qatrun.evaluate.causes import POINTS
from qatrun.records.diagnosis import Cause, Effect, Look, TensorRecord, TextEffect
from qatrun.scheme import Scheme
from qatrun.text import listed

SHOWN_LOOKS = 2


@dataclass(frozen=True)
class Said:
    """What a sentence is made of.

    Attributes:
        twin: name of the arm's BF16 twin; `learning_rate` is the arm's.
        trained: whether the arm was, else it is the twin, calibrated.
        alarms: kind -> step of the first.
        worst: quantized tensors, those that clip most first; `scheme` is that of the first, where it is known.
        since: the step that first showed the first cause.
    """

    twin: str
    trained: bool
    learning_rate: float
    causes: Mapping[str, Cause]
    effects: Mapping[str, Effect]
    texts: Mapping[str, Mapping[str, TextEffect]]
    alarms: Mapping[str, int]
    worst: Sequence[TensorRecord]
    scheme: Scheme | None
    since: int | None

    def __str__(self) -> str:
        found = self._with("found")
        parts = [getattr(self, f"_{cause}")(self.causes[cause]) for cause in found]
        since = f"since about step {self.since} " if found and self.since is not None else ""
        text = since + "; and ".join(parts)
        return "; ".join(filter(None, (text, *self._open(bool(found)))))

    def _open(self, anything: bool) -> Iterator[str]:
        """What was not found: ruled out, or not shown."""
        hidden = self._with("not shown")
        if not anything:
            costs = f"quantization costs {self._cost('whole')} against {self.twin}"
            if "training" in self.texts or "training" in self.effects:
                costs += f", training {self._cost('training')} against the start model"
            yield f"nothing was found: {costs}" if hidden else f"nothing broke: {costs}"
        if hidden:
            yield f"not shown: {listed(f'{name} ({_could_hide(self.causes[name])})' for name in hidden)}"
        if self.alarms and not anything:
            alarms = ", ".join(f"{kind} at step {step}" for kind, step in self.alarms.items())
            left = "these scores cannot tell what they cost" if hidden else "what they cost lies below every threshold"
            yield f"its alarms ({alarms}): {left}"

    def _with(self, answer: str) -> list[str]:
        return [name for name, cause in self.causes.items() if cause.answer == answer]

    def _input(self, cause: Cause) -> str:
        return f"the training text is none to this model, which before training takes {_seen(cause)}; {advice.INPUT}"

    def _forgetting(self, cause: Cause) -> str:
        input_ = self.causes.get("input")
        wrong_text = input_ is not None and input_.answer == "found"
        remedy = "" if wrong_text else f"; {advice.FORGETTING} ({self.learning_rate:g})"
        return (
            f"training forgot: {self.twin}, without any quantizer, lost {_seen(cause)} against the start model{remedy}"
        )

    def _saturation(self, cause: Cause) -> str:
        return f"scales saturate: {self._beyond_fitting(cause)}" + (
            f"; {self._worst_clip(self.worst[0])}" if self.worst else ""
        )

    def _beyond_fitting(self, cause: Cause) -> str:
        return f"quantization costs {_seen(cause)}, of which fitting scales would cost {self._cost('ptq')}"

    def _worst_clip(self, worst: TensorRecord) -> str:
        steady = (worst.typical_overshoot or 0.0) > advice.STEADY
        return (
            f"worst {worst.tensor} clips {100 * worst.clip_fraction:.2g} % (overshoot up to {worst.overshoot:.1f}x): "
            f"{advice.against_saturation(self.scheme, worst.overshoot, steady=steady)}"
        )

    def _resolution(self, cause: Cause) -> str:
        if any("beyond ptq" in look.effects for look in cause.looks):
            return f"scales are too large: {self._beyond_fitting(cause)}; {self._loosest()}{advice.TOO_LARGE}"
        measured = [record for record in self.worst if record.sqnr_db is not None]
        coarsest = min(measured, key=lambda record: record.sqnr_db or math.inf, default=None)
        where = "" if coarsest is None else f"worst {coarsest.tensor} keeps {coarsest.sqnr_db:.1f} dB: "
        even = f", and even fitting scales {self._cost('ptq')}" if self.trained else ""
        return f"the grid is too coarse: quantization costs {_seen(cause)}{even}; {where}{advice.RESOLUTION}"

    def _loosest(self) -> str:
        fills = {each.tensor: each.typical_overshoot for each in self.worst if each.typical_overshoot}
        loosest = min(fills, key=fills.__getitem__, default=None)
        return "" if loosest is None else f"{loosest} fills {100 * fills[loosest]:.0f} % of its range: "

    def _divergence(self, cause: Cause) -> str:
        return (
            f"training under quantization lost {_seen(cause)} against {self.twin}, which neither clipping nor the grid "
            f"explains; {advice.UNEXPLAINED}"
        )

    def _cost(self, name: str) -> str:
        """An effect on held-out text and on the items, as far as it was measured."""
        parts = []
        if (text := self.texts.get(name, {}).get("held-out")) is not None:
            low, high = text.ci95
            parts.append(f"{text.rise:.3f} nats a token [{low:.3f}, {high:.3f}]")
        if (effect := self.effects.get(name)) is not None:
            low, high = effect.ci95_pp
            parts.append(f"{effect.drop_pp:.1f} pp [{low:.1f}, {high:.1f}]")
        return " and ".join(parts)


def _seen(cause: Cause) -> str:
    """The looks that found it, by its first effect; the text's before the items'."""
    found = [look for look in cause.looks if look.answer == "found"]
    return " and ".join(_one(look) for look in found[:SHOWN_LOOKS])


def _one(look: Look) -> str:
    low, high = look.intervals[0]
    digits = 1 if look.unit == POINTS else 3
    numbers = f"{look.values[0]:.{digits}f} {look.unit} [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{numbers} of {look.what}"


def _could_hide(cause: Cause) -> str:
    if cause.could_hide is None:
        return "nothing here measures it"
    return f"up to {cause.could_hide:.3f} {cause.unit} could hide"
