"""What each candidate costs, as a table, and what to do."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from qatrun.layout import PAGE_FILE
from qatrun.records.advice import Advice, Candidate
from qatrun.report.grid import Grid
from qatrun.text import readable_size

_WORDS = {"within": "within the budget", "exceeds": "above the budget", "inconclusive": "not known", None: ""}


def advice_table(found: Advice) -> RenderableType:
    """advice.json."""
    title = f"{found.model}: what calibration alone loses, on {found.num_tokens:,} held-out tokens"
    table = Grid(title, "arm", "weights", "nats a token", "95%", "answer")
    table.add_row(PLAIN, readable_size(found.bf16_bytes), f"({found.plain_nats:.4f})", "", "")
    for each in found.candidates:
        low, high = each.ci95 or (None, None)
        table.add_row(
            each.name,
            "" if each.weight_bytes is None else readable_size(each.weight_bytes),
            "" if each.nats is None else f"{each.nats:+.5f}",
            "" if low is None else f"{low:+.5f} .. {high:+.5f}",
            Text(said_of(each, found.advised), "" if each.is_advisable else "dim"),
        )
    notes = [
        "weights: of the whole model, estimated from shapes, scales aside; intervals of all candidates hold together",
        *(
            f"memory of {arm}, estimated: {', '.join(f'{phase} {readable_size(size)}' for phase, size in by.items())}"
            for arm, by in found.memory_bytes.items()
            if by
        ),
    ]
    if found.curve is not None:
        notes.append(f"which linears lose it: {found.curve}/{PAGE_FILE}")
    said = [Text(f"{'' if n == 0 else '- '}{line}") for n, line in enumerate(found.answer.split("; "))]
    return Group(table, *(Text(note, "dim") for note in notes), Text(), *said)


PLAIN = "bf16"


def said_of(candidate: Candidate, advised: str) -> str:
    """One of the candidates in a few words."""
    parts = [_WORDS[candidate.verdict], *([candidate.why] if candidate.why else [])]
    if candidate.runs not in (None, "natively"):
        how = "not known whether it runs" if candidate.runs == "not known" else f"runs {candidate.runs}"
        parts = [f"{how}: {candidate.why}", parts[0]]
    return ", ".join([*(["advised"] if candidate.name == advised else []), *filter(None, parts)])
