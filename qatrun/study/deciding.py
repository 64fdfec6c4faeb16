"""Whether calibration is enough for a budget, or training under quantization is worth trying: pure functions of intervals.

the whole interval of some candidate within the budget -> calibration is enough, by the one of these that loses least
every interval wholly above it                         -> training is worth trying, of the one that loses least
else                                                   -> not known; more text would tell
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qatrun.records.advice import Advice, Candidate, Way
from qatrun.records.values import Verdict


def verdict_of(interval: Sequence[float], budget: float) -> Verdict:
    """Of an interval of nats a token."""
    low, high = interval
    if high <= budget:
        return "within"
    return "exceeds" if low > budget else "inconclusive"


def decide(candidates: Sequence[Candidate]) -> tuple[Candidate, Way]:
    """(the one to go on with, how), of candidates that can be advised; at least one."""
    ways: dict[Verdict, Way] = {"within": "ptq", "inconclusive": "not known", "exceeds": "qat"}
    for verdict, way in ways.items():
        if those := [each for each in candidates if each.verdict == verdict]:
            return min(those, key=_nats), way
    raise ValueError("no candidate was measured")


def tokens_needed(candidate: Candidate, budget: float, num_tokens: int) -> int | None:
    """Of held-out text like that which was read, for the interval to leave the budget out; None where none would do."""
    assert candidate.ci95 is not None
    low, high = candidate.ci95
    distance = abs(_nats(candidate) - budget)
    return math.ceil(num_tokens * ((high - low) / 2 / distance) ** 2) if distance else None


def in_order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that can be advised, those that the hardware does not run, those that cannot be made; each by what they lose."""
    return sorted(candidates, key=lambda each: (not each.is_advisable, _nats(each)))


def answer_in_words(found: Advice) -> str:
    """What to do and why, in sentences that say no more than was measured."""
    best = next(each for each in found.candidates if each.name == found.advised)
    assert best.ci95 is not None
    low, high = best.ci95
    budget = f"the budget of {found.budget:.3g} nats a token"
    loss = f"{best.name} by calibration alone loses {best.nats:+.5f} nats a token [{low:.5f}, {high:.5f}]"
    said = {
        "ptq": f"calibration is enough (method: ptq): {loss}, the whole interval within {budget}; what "
        "training could win back is no more",
        "ptq with some kept": f"calibration is enough (method: ptq) with {len(found.kept)} linears in BF16: without them "
        f"{loss}, more than {budget}; with them it is within",
        "qat": f"train under quantization: {loss}, the whole interval above {budget}, and no other candidate is within it; "
        "what training wins back is not known before it is done: the recipe trains it beside its BF16 twin, and beside "
        "calibration of that twin, which says by how much it is better",
        "not known": f"not known: {loss}, and {budget} lies in the interval; {_more_text(found)}, or train the "
        "recipe, which compares QAT with calibration",
    }[found.way]
    kept = "" if found.sensitivity is None else f"; by linears: {found.sensitivity}"
    asked = (
        "; which of them a chip runs was not asked: --hardware CHIP"
        if found.hardware is None
        else f"; {sum(each.is_advisable for each in found.candidates)} of {len(found.candidates)} candidates are known to "
        f"run natively on {found.hardware}, by the documents named in `qatrun check --hardware`"
    )
    return f"{said}{kept}{asked}; accuracy on tasks and speed were not measured"


def _more_text(found: Advice) -> str:
    if found.tokens_needed is None:
        return "no text would settle it: the loss is the budget"
    return f"about {found.tokens_needed:,} held-out tokens (now {found.num_tokens:,}) would settle it (data.valid_sequences)"


def _nats(candidate: Candidate) -> float:
    return math.inf if candidate.nats is None else candidate.nats
