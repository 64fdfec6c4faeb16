"""Remedies that were tried, as a table: what was lost before, what is lost now."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from qatrun.records.diagnosis import Cause
from qatrun.records.fix import FixedArm, Fixes
from qatrun.report.grid import Grid
from qatrun.text import interval


def fix_table(fixes: Fixes) -> RenderableType:
    """fix.json."""
    if fixes.healthy:
        return Text("nothing to fix: the diagnosis found no cause", style="green")
    table = Grid("", "arm", "remedy", "cause", "before", "after", "cured")
    for fixed in fixes.arms:
        if not fixed.arm:
            table.add_row(Text(fixed.of), "nothing that a recipe can say", ", ".join(fixed.causes), "", "", "")
            continue
        for number, cause in enumerate(fixed.causes):
            first = (Text(fixed.arm), Text(fixed.remedy)) if number == 0 else ("", "")
            now = [seed[cause].answer for seed in fixed.after]
            cured = Text("yes", "green") if set(now) == {"ruled out"} else Text(_worst(now), "yellow")
            table.add_row(*first, cause, _lost(fixed.before, cause), _lost(fixed.after, cause), cured)
    return Group(table, *(Text(line) for fixed in fixes.arms for line in _lines(fixed)))


def _worst(answers: Sequence[str]) -> str:
    return "no" if "found" in answers else "not shown"


def _lost(seeds: Sequence[dict[str, Cause]], cause: str) -> str:
    """By the first look, of each seed."""
    looks = [seed[cause].looks[0] for seed in seeds if seed[cause].looks]
    return ", ".join(f"{look.values[0]:+.3f} [{interval(look.intervals[0], 3)}]" for look in looks) or "-"


def _lines(fixed: FixedArm) -> list[str]:
    gains = [f"{gain.nats:+.3f} nats a token of {gain.text} text [{interval(gain.ci95, 3)}]" for gain in fixed.gains]
    said = f"{fixed.arm} gives back {', '.join(gains)} of what {fixed.of} takes" if gains else ""
    return [line for line in (said, fixed.sentence) if line]
