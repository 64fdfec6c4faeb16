"""fix.json: remedies that were tried as arms of their own, and what each gave back."""

from __future__ import annotations

from pydantic import Field

from qatrun.files import Record
from qatrun.records.diagnosis import Cause
from qatrun.records.values import Interval


class Gain(Record):
    """What the new arm takes less than the old one on a text, nats a token, paired by sequence.

    Attributes:
        study: folder of the seed.
    """

    study: str
    text: str
    nats: float
    ci95: Interval


class FixedArm(Record):
    """One remedy for one arm.

    Attributes:
        arm: the new arm; empty where nothing could be tried.
        of: the arm in which `causes` were found.
        cured: whether every cause is ruled out for the new arm, for each seed.
        before, after: of each seed, cause -> what was found.
    """

    of: str
    causes: list[str]
    arm: str = ""
    remedy: str = ""
    cured: bool = False
    before: list[dict[str, Cause]] = Field(default_factory=list)
    after: list[dict[str, Cause]] = Field(default_factory=list)
    gains: list[Gain] = Field(default_factory=list)
    sentence: str = ""


class Fixes(Record):
    """fix.json; `healthy` says that no cause was found in any arm."""

    arms: list[FixedArm]
    healthy: bool = False
