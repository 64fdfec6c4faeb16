"""The top of a study's page: what it came to, in words and colours that promise no more than was shown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from qatrun.layout import START
from qatrun.records.diagnosis import ArmDiagnosis
from qatrun.records.training import distinct
from qatrun.report.page.content import ArmContent, StudyContent
from qatrun.report.page.document import VERDICT_CHIPS, Chip, Point, Verdict
from qatrun.report.page.table import printable


def study_verdict(content: StudyContent) -> Verdict:
    """Chips and sentences, of the study and of each arm."""
    diagnosed = content.diagnosed
    verdicts = {pair.arm: pair.comparison.verdict for pair in content.pairs}
    overall = content.comparison.verdict if content.comparison else None
    sentence = content.diagnosis.sentence if content.diagnosis else _plain_sentence(verdicts, overall)
    names = [arm.name for arm in content.arms if arm.name in diagnosed or arm.name in verdicts]
    points = tuple(
        Point(
            _of_arm(diagnosed, name, sentence),
            name,
            (
                *_beside_alarms(
                    (
                        VERDICT_CHIPS[verdicts.get(name)],
                        *(_cause_chips([diagnosed[name]]) if name in diagnosed else ()),
                    ),
                    [arm for arm in content.arms if arm.name in (name, _twin_of(content, name))],
                ),
            ),
        )
        for name in names
    )
    condition = next((pair.comparison.conditional_on for pair in content.pairs), "")
    return Verdict(
        (
            *_beside_alarms(
                (
                    VERDICT_CHIPS[overall],
                    *(_cause_chips(diagnosed.values()) if content.diagnosis else (Chip("Not diagnosed", "none"),)),
                ),
                content.arms,
            ),
            *((Chip("Weights changed since", "bad"),) if content.changed else ()),
            *_training_chip(content),
        ),
        printable(sentence),
        points if len(points) > 1 else (),
        f"Conditional on {condition}." if condition else "",
    )


def _of_arm(diagnosed: Mapping[str, ArmDiagnosis], name: str, said: str) -> str:
    """The sentence on an arm, unless it was `said` already."""
    sentence = diagnosed[name].sentence if name in diagnosed else ""
    return "" if sentence == said else printable(sentence)


def _cause_chips(arms: Collection[ArmDiagnosis]) -> tuple[Chip, ...]:
    """What was found, and what was not shown; that nothing broke only where every cause of every arm is ruled out."""
    found = dict.fromkeys(name for arm in arms for name in arm.findings)
    open_ = dict.fromkeys(name for arm in arms for name, cause in arm.causes.items() if cause.answer == "not shown")
    chips = (
        *(Chip(printable(name).capitalize(), "bad") for name in found),
        *(
            Chip(f"{printable(name).capitalize()} not shown{_could_hide(arms, name)}", "warn")
            for name in open_
            if name not in found
        ),
    )
    if chips:
        return chips
    whole = all(arm.causes for arm in arms)  # an earlier version did not say what it ruled out
    return (Chip("Nothing broke", "good") if whole else Chip("Nothing found", "none"),)


def _could_hide(arms: Collection[ArmDiagnosis], name: str) -> str:
    """How much of a cause these arms leave open."""
    causes = [arm.causes[name] for arm in arms if name in arm.causes and arm.causes[name].answer == "not shown"]
    bounds = [(cause.could_hide, cause.unit) for cause in causes if cause.could_hide is not None]
    return ": up to {:.2g} {} could hide".format(*max(bounds)) if bounds else ""


def _beside_alarms(chips: tuple[Chip, ...], arms: Iterable[ArmContent]) -> tuple[Chip, ...]:
    """The alarms as a pill behind the verdict's, none of which is green while one stands."""
    alarms = _alarm_chip(arms)
    standing = tuple(Chip(chip.word, "warn") if alarms and chip.state == "good" else chip for chip in chips)
    return (*standing[:1], *alarms, *standing[1:])


def _twin_of(content: StudyContent, name: str) -> str | None:
    return next((arm.twin for arm in content.arms if arm.name == name), None)


def _training_chip(content: StudyContent) -> tuple[Chip, ...]:
    """Where what training lost is not surely small."""
    lost = [pair.comparison.training for pair in content.pairs if pair.twin != START]
    verdicts = {each.verdict for each in lost if each is not None}
    if "exceeds" in verdicts:
        return (Chip("Training lost too much", "bad"),)
    return (Chip("Training inconclusive", "warn"),) if "inconclusive" in verdicts else ()


def _alarm_chip(arms: Iterable[ArmContent]) -> tuple[Chip, ...]:
    count = len(distinct(row for arm in arms for row in arm.alarms))
    return (Chip(f"{count:,} alarm{'s' if count > 1 else ''}", "alarm"),) if count else ()


def _plain_sentence(verdicts: Mapping[str, str], worst: str | None) -> str:
    """What the comparison alone says."""
    if worst is None:
        return "Nothing was compared yet: the study is not finished, or no arm has a BF16 twin."
    arms = ", ".join(name for name, verdict in verdicts.items() if verdict == worst)
    return {
        "within": f"{arms}: every drop lies within its budget.",
        "inconclusive": f"{arms}: these items cannot tell whether the drop lies within its budget.",
        "exceeds": f"{arms}: a drop exceeds its budget.",
    }[worst]
