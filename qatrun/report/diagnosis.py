"""A diagnosis on the terminal: the sentence, then what it stands on."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from qatrun.records.diagnosis import ArmDiagnosis, Cause, Look, TensorRecord
from qatrun.records.values import Answer
from qatrun.report.grid import Grid
from qatrun.text import interval

ANSWER_STYLES: dict[Answer, str] = {"found": "bold red", "not shown": "yellow", "ruled out": "green"}
UNITS = {"nats a token": 3, "nats an answer": 3, "pp": 2}  # decimals


def diagnosis_table(arm: ArmDiagnosis, alarms: int = 0) -> RenderableType:
    """One arm of diagnosis.json.

    Args:
        alarms: raised in its study; nothing is green beside one.
    """
    parts: list[RenderableType] = [Text(arm.sentence, style=_style(arm, alarms)), Text()]
    causes = Grid("", "cause", "answer", "seen on", "value", "interval", "limit")
    for name, cause in arm.causes.items():
        answer = Text(cause.answer, style=ANSWER_STYLES[cause.answer])
        causes.add_row(Text(name), answer, *_look_cells(_told(cause)))
    if arm.causes:
        parts += [causes, Text()]
    effects = Grid("", "lost", "from", "to", "nats a token", "95% interval", "pp", "95% interval")
    items = {effect.name: effect for effect in arm.effects}
    for name in dict.fromkeys([*items, *arm.texts]):
        text, effect = arm.texts.get(name, {}).get("held-out"), items.get(name)
        if effect is None:
            continue
        effects.add_row(
            *(name, effect.source, effect.target),
            *(("-", "-") if text is None else (f"{text.rise:+.4f}", interval(text.ci95, 4))),
            *(f"{effect.drop_pp:+.2f}", interval(effect.ci95_pp)),
        )
    parts += [effects, Text()]
    parts.append(Text("perplexity: " + ", ".join(f"{key} {value:.3f}" for key, value in arm.perplexity.items())))
    if arm.known_text:
        parts.append(Text(f"text it knew: {arm.known_text}"))
    parts += [Text(line) for line in _tensor_lines(arm.worst_tensors)]
    return Group(*parts)


def _style(arm: ArmDiagnosis, alarms: int) -> str:
    """Green only where every cause is ruled out, and no alarm stands."""
    answers = {cause.answer for cause in arm.causes.values()}
    if arm.findings:
        return "bold red"
    return "bold green" if answers == {"ruled out"} and not alarms else "bold yellow"


def _told(cause: Cause) -> Look | None:
    """Of the looks that decided, the one that goes furthest towards its limit, or beyond; None where there is none."""
    decided = [look for look in cause.looks if look.answer == cause.answer and (look.decides or look.answer == "found")]
    return max(decided, key=_nearness, default=None)


def _nearness(look: Look) -> float:
    """How near its upper end comes to the limit, in half widths."""
    low, high = look.intervals[_deciding(look)]
    return (high - look.threshold) / max(high - low, 1e-12)


def _deciding(look: Look) -> int:
    """Of its effects, all of which must matter, the place of the one that left least open."""
    return min(range(len(look.values)), key=lambda number: look.intervals[number][1])


def _look_cells(look: Look | None) -> tuple[str, ...]:
    if look is None:
        return "", "", "", ""
    place = _deciding(look)
    decimals = UNITS[look.unit]
    what = f"{look.what}: {look.effects[place]}" if len(look.effects) > 1 else look.what
    edges = interval(look.intervals[place], decimals)
    return what, f"{look.values[place]:+.{decimals}f}", edges, f"{look.threshold:g} {look.unit}"


def _tensor_lines(tensors: list[TensorRecord]) -> Iterator[str]:
    for tensor in tensors[:3]:
        sqnr = "" if tensor.sqnr_db is None else f", SQNR {tensor.sqnr_db:.1f} dB"
        since = "" if tensor.since_step is None else f" since step {tensor.since_step}"
        yield (
            f"{tensor.tensor}: clips {100 * tensor.clip_fraction:.2g} %{since}, "
            f"overshoot up to {tensor.overshoot:.1f}x{sqnr}"
        )
