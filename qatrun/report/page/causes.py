"""What decides a diagnosis: effects on held-out text, and each cause with what it was seen on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qatrun.records.diagnosis import ArmDiagnosis, TextEffect
from qatrun.report.page.content import StudyContent
from qatrun.report.page.figure import Figure, arm_keys
from qatrun.report.page.forest import Group, Mark, forest_figure
from qatrun.report.page.table import Table, Written, bounds, printable, signed, signed_range, table

OF_START = (
    "training",
    "forgetting",
)  # told on text that the start model knew: the held-out text is there to be learned


def text_figure(content: StudyContent) -> Figure | None:
    """Every effect on held-out text; None where no arm was diagnosed on text."""
    indices = {arm.name: arm.index for arm in content.arms}
    found = [
        (arm, name if text == "held-out" else f"{name}, on text it knew", of_text)
        for arm, diagnosis in content.diagnosed.items()
        if arm in indices
        for name, texts in diagnosis.texts.items()
        for text, of_text in texts.items()
        if (text == "known" and name == "training") or (text == "held-out" and name not in OF_START)
    ]
    if not found:
        return None
    groups = [
        Group(printable(name), [_text_mark(arm, name, each, indices[arm]) for arm, of, each in found if of == name])
        for name in dict.fromkeys(name for _, name, _ in found)
    ]
    whole = {arm: each for arm, name, each in found if name == "whole"}
    if not whole:
        return None
    arm, worst = max(whole.items(), key=lambda each: each[1].rise)
    rows = [
        (arm, name, text, of_text.rise, *of_text.ci95, of_text.num_tokens)
        for arm, diagnosis in content.diagnosed.items()
        for name, texts in diagnosis.texts.items()
        for text, of_text in texts.items()
    ]
    return forest_figure(
        "text-effects",
        f"On held-out text quantization costs {printable(arm)} {signed(worst.rise, 4)} nats a token "
        f"(95% interval {signed_range(worst.ci95, 4)})",
        "Rise of the negative log-likelihood of held-out text, and where it says so of text that the start model knew; bars "
        "are paired 95% intervals over sequences that both models read.",
        groups,
        "nats a token",
        table(("arm", "effect", "text", "rise", "low", "high", "tokens"), rows),
        legend=arm_keys({name: indices[name] for name in content.diagnosed if name in indices}),
        zero="right of 0: it costs likelihood",
    )


def causes_table(diagnosed: Mapping[str, ArmDiagnosis]) -> Table:
    """Every cause with what decided, a row a look."""
    rows = [
        (
            *(name, cause, found.answer, look.what, " and ".join(look.effects)),
            *(_each([Written(signed(value, 3), {"": value}) for value in look.values]), look.threshold, look.unit),
            _each([bounds(interval, 3) for interval in look.intervals]),
        )
        for name, arm in diagnosed.items()
        for cause, found in arm.causes.items()
        for look in found.looks
        if look.decides or look.answer == "found"
    ]
    columns = ("arm", "cause", "answer", "seen on", "effect", "value", "limit", "unit", "interval")
    return table(columns, rows, "Causes: found, ruled out, or not shown; intervals hold together at 95%", "causes")


def _each(found: Sequence[Written]) -> Written:
    """What decides a look, one for each of its effects."""
    numbers = {
        f"{place or ''} {key}".strip(): number
        for place, each in zip((0, *range(2, len(found) + 1)), found, strict=False)
        for key, number in each.numbers.items()
    }
    return Written(" and ".join(map(str, found)), numbers)


def _text_mark(arm: str, name: str, effect: TextEffect, index: int) -> Mark:
    numbers = f"{signed(effect.rise, 4)} [{signed_range(effect.ci95, 4)}]"
    return Mark(
        effect.rise, index, effect.ci95, text=numbers, title=printable(f"{arm}, {name}: {numbers} nats a token")
    )
