"""Whether calibration is enough for a budget, or training under quantization is worth trying: pure functions of intervals.

the whole interval of some candidate within the budget -> calibration is enough, by the one of these that loses least
every interval wholly above it                         -> the one that loses least, with the linears in BF16 that carry its
                                                          loss where these are few, is another candidate; if there is none,
                                                          or it is above too, training is worth trying
else                                                   -> not known; more text would tell
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qatrun.records.advice import Advice, Candidate, Way
from qatrun.records.sensitivity import Sensitivity
from qatrun.records.values import Verdict
from qatrun.study.keeping import QUARTER
from qatrun.text import listed


def verdict_of(interval: Sequence[float], budget: float) -> Verdict:
    """Of an interval of nats a token."""
    low, high = interval
    if high <= budget:
        return "within"
    return "exceeds" if low > budget else "inconclusive"


def decide(candidates: Sequence[Candidate]) -> tuple[Candidate, Way]:
    """(the one to go on with, how), of those that can be advised; at least one can."""
    ways: dict[Verdict, Way] = {"within": "ptq", "inconclusive": "not known", "exceeds": "qat"}
    for verdict, way in ways.items():
        if those := [each for each in candidates if each.is_advisable and each.verdict == verdict]:
            best = min(those, key=_nats)
            return best, "ptq with some kept" if way == "ptq" and best.kept else way
    raise ValueError("no candidate was measured")


def worth_keeping(found: Sensitivity) -> tuple[tuple[str, ...], str]:
    """(linears to leave in BF16: few that carry the loss, or none; what the search came to, in words)."""
    kept = [group for group in found.groups if group.kept]
    share = sum(group.share for group in kept)
    linears = tuple(name for group in kept for name in group.linears)
    if not kept or found.flat:
        return (), "no few do: nothing is worth keeping in BF16"
    if share > QUARTER:
        return (), f"{100 * share:.0f} % of the weights would have to stay in BF16, more than a quarter is not tried"
    return linears, f"{listed(linears)}, {100 * share:.0f} % of the weights, lose most of it"


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
    named = "one linear" if len(best.kept) == 1 else f"{len(best.kept)} linears"
    budget = f"the budget of {found.budget:.3g} nats a token"
    loss = f"{best.name} by calibration alone loses {best.nats:+.5f} nats a token [{low:.5f}, {high:.5f}]"
    said = {
        "ptq": f"calibration is enough (method: ptq): {loss}, the whole interval within {budget}; what "
        "training could win back is no more",
        "ptq with some kept": f"calibration is enough (method: ptq) with {named} in BF16: {loss}, the "
        f"whole interval within {budget}, above which is every candidate that quantizes them",
        "qat": f"train under quantization: {loss}, the whole interval above {budget}, and no other candidate is within it; "
        "what training wins back is not known before it is done: the recipe trains it beside its BF16 twin, and beside "
        "calibration of that twin, which says by how much it is better",
        "not known": f"not known: {loss}, and {budget} lies in the interval; {_more_text(found)}, or train the "
        "recipe, which compares QAT with calibration",
    }[found.way]
    kept = "" if found.sensitivity is None else f"; which linears lose it: {found.sensitivity}"
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
