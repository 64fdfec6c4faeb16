"""The page of an advice: what to do, and every candidate."""

from __future__ import annotations

from qatrun.layout import PAGE_FILE
from qatrun.records.advice import Advice
from qatrun.report.advice import said_of
from qatrun.report.page.document import Chip, Document, Section, Verdict
from qatrun.report.page.table import printable, sentence_case, table


def advice_document(name: str, found: Advice) -> Document:
    """Everything on the page."""
    rows = [
        (each.name, each.weight_bytes, each.nats, *(each.ci95 or (None, None)), printable(said_of(each, found.advised)))
        for each in found.candidates
    ]
    columns = ("arm", "bytes of weights", "nats a token", "low", "high", "answer")
    candidates = table(columns, rows, "What calibration alone loses", "candidates")
    needs = [(arm, phase, size) for arm, phases in found.memory_bytes.items() for phase, size in phases.items()]
    memory = table(("arm", "phase", "bytes"), needs, "Peak memory of the recipe, estimated", "memory")
    condition = (
        f"Measured on {found.num_tokens:,} held-out tokens in {found.num_sequences:,} sequences, paired with the model "
        "without quantization; the intervals of all candidates hold together at 95 %. Sizes are estimated from shapes."
    )
    good = found.way in ("ptq", "ptq with some kept")
    chips = (Chip(f"{sentence_case(found.way)}: {found.advised}", "good" if good else "warn"),)
    verdict = Verdict(chips, printable(sentence_case(found.answer)), condition=condition)
    notes: tuple[str, ...] = (f"{found.recipe} is the recipe.",)
    if found.curve is not None:
        notes += (printable(f"Which linears lose it: {found.curve}/{PAGE_FILE}."),)
    sections = (
        Section("candidates", "Candidates", tables=(candidates,), notes=notes),
        Section("memory", "Memory", tables=(memory,)),
    )
    facts = (found.source, found.model, found.hardware or "hardware not asked")
    return Document(name, "advice", tuple(printable(fact) for fact in facts), verdict, sections, {})
