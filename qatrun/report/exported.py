"""What was proven of an exported folder, in sentences: on the terminal, on its card and on the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from qatrun.records.export import EngineMatch, Exported, LinearsProof, TextProof

SERVED_BY = {
    "compressed-tensors": "vllm serve {folder}",
    "ascend-v1": "vllm serve {folder} --quantization ascend",
    "onnx": 'onnxruntime.InferenceSession("{folder}/model.onnx").run(["logits"], {{"input_ids": ids}})',
}


def exported_table(folder: Path, record: Exported) -> RenderableType:
    """An exported folder: what is in it, what was proven, what to know, how to serve it."""
    parts: list[RenderableType] = [Text(f"{folder}: {contents(record)}", style="bold")]
    parts += [Text(f"  {line}") for line in proofs(record)]
    parts += [Text(f"  note: {note}", style="dim") for note in record.notes]
    if (command := serving(folder, record)) is not None:
        parts.append(Text(f"  serve it: {command}"))
    return Group(*parts)


def contents(record: Exported) -> str:
    """What is quantized, and how."""
    schemes = "; ".join(f"{count} of {scheme}" for scheme, count in record.schemes.items())
    rest = "float32" if record.format == "onnx" else record.compute_dtype
    return f"{record.format}, {record.linears} linears ({schemes}), the rest {rest}"


def proofs(record: Exported) -> Iterator[str]:
    """A sentence on each proof, and on each that could not be made."""
    codes = record.codes
    yield f"file: {codes.codes:,} codes and {codes.scales:,} scales, equal to those that were scored, bit for bit"
    if record.decoded_by is not None:
        yield f"codes: {record.decoded_by} reads them as the numbers that were scored"
    if record.linears_proof is not None:
        yield _of_linears(record.linears_proof)
    if record.text_proof is not None:
        yield from _of_text(record.text_proof, record.compute_dtype)
    for match in record.scored:
        yield from match_lines(match)
    for what, why in record.not_checked.items():
        yield f"{what}: not checked, {why}"


def serving(folder: Path, record: Exported) -> str | None:
    """The command that serves the folder; None where there is none to give."""
    command = SERVED_BY.get(record.format)
    return None if command is None else command.format(folder=folder)


def holds(record: Exported) -> bool:
    """Whether all that must be equal is."""
    text = record.text_proof
    return text is None or text.equal or not text.must_be_equal


def match_lines(match: EngineMatch) -> Iterator[str]:
    """A sentence on each task that was scored in an engine too."""
    for task in match.tasks:
        flips = task.flips_to_wrong + task.flips_to_right
        same = "all answers the same" if not flips else f"{task.flips_to_wrong}↓ {task.flips_to_right}↑ flips"
        largest = task.max_abs_delta_loglikelihood
        shift = "log-likelihoods equal, bit for bit" if largest == 0 else f"log-likelihoods within {largest:.2g} nats"
        yield (
            f"scores: {task.task} {100 * task.engine:.2f} in {match.engine}, {100 * task.scored:.2f} as scored: {same} of "
            f"{task.items:,} items, {shift}"
        )


def _of_linears(proof: LinearsProof) -> str:
    given = ", with the engine's token scales" if proof.scales_are_the_engines else ""
    if proof.rows_equal == proof.rows:
        return (
            f"linears: all {proof.rows:,} rows of {proof.linears} linears equal in {proof.engine}, bit for bit{given}"
        )
    text = (
        f"linears: {proof.rows:,} rows of {proof.linears} linears within {proof.worst:.1e} of max |y| in "
        f"{proof.engine}{given}"
    )
    otherwise = {"half-way between two": proof.rows_tied, "below -127.5 s": proof.rows_clipped}
    if shown := [f"{count:,} rows ({what})" for what, count in otherwise.items() if count]:
        text += f"; another code for an input in {' and '.join(shown)}, which changes y by up to {proof.worst_otherwise:.1e}"
    return text


def _of_text(proof: TextProof, scored_in: str) -> Iterator[str]:
    as_scored = "as scored" if proof.dtype == scored_in else f"as scored, but in {proof.dtype} (not {scored_in})"
    where = f"{proof.text} ({proof.tokens:,} tokens, {proof.dtype}) in {proof.engine}"
    if proof.perplexity_scored is not None and proof.perplexity_exported is not None:
        yield (
            f"text: perplexity {proof.perplexity_scored:.4f} {as_scored}, {proof.perplexity_exported:.4f} on {where}; the "
            f"same next token for {100 * proof.same_top1:.2f} %"
        )
    else:
        yield f"text: the same next token for {100 * proof.same_top1:.2f} % of {where}"
    if proof.equal:
        yield "logits: equal, bit for bit"
    elif proof.must_be_equal:
        yield f"logits: NOT equal, though every scale is a power of two: they differ by up to {proof.max_difference:.2g}"
    else:
        why = "attention and norms of another library" if proof.other_kernels else "scales that are no powers of two"
        if proof.values_clipped:
            why = f"{proof.values_clipped:,} inputs below -127.5 s, or {why},"
        yield f"logits: they differ by up to {proof.max_difference:.2g}, as {why} allow"
