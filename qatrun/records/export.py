"""export.json of an exported folder: what it was made from, and what was proven of it."""

from __future__ import annotations

from pydantic import Field

from qatrun.files import Record
from qatrun.records.values import Verdict


class CodesProof(Record):
    """Codes and scales as they are read back from the file against those that were scored, bit for bit."""

    linears: int
    codes: int
    scales: int
    differing: int


class LinearsProof(Record):
    """Every quantized linear in the engine against the one that was scored, given the same input, in float32.

    Attributes:
        rows: of outputs compared; `rows_equal` of them bit for bit.
        worst: largest |difference| over max |y| of the engine's outputs from the scored product of the codes that the
            engine makes of the inputs; must be below 1e-6.
        rows_tied, rows_clipped: with an input that is another code there: half-way between two for one of x / s and
            x * (1 / s), or below -127.5 s, where INT8 clips at -128 instead of -127; `worst_otherwise` is what that changes.
        scales_are_the_engines: token scales that the engine makes by a rule of its own; they were given to both.
    """

    engine: str
    linears: int
    rows: int
    rows_equal: int
    rows_tied: int
    rows_clipped: int
    worst: float
    worst_otherwise: float
    scales_are_the_engines: bool


class TextProof(Record):
    """The whole model in the engine against the one that was scored, on the same text, in the compute dtype.

    Attributes:
        text: what it is, in words; perplexities are None where it is no text.
        perplexity_scored, perplexity_exported: of the tokens that count.
        same_top1: share of tokens for which both think the same next one likeliest.
        values_clipped: inputs of linears below -127.5 s, which engines clip at -128 s.
        equal: whether all logits are equal, bit for bit; `must_be_equal` where every scale is a power of two that the
            engine takes from the file, and nothing is clipped otherwise.
        other_kernels: whether attention, norms and the rest are another library's, which rounds them otherwise.
        max_difference: of two logits.
    """

    engine: str
    text: str
    tokens: int
    dtype: str
    perplexity_scored: float | None
    perplexity_exported: float | None
    same_top1: float
    values_clipped: int
    equal: bool
    must_be_equal: bool
    other_kernels: bool
    max_difference: float


class TaskMatch(Record):
    """One task, answered in the engine and by the arm when it was scored.

    Attributes:
        flips_to_wrong: items right when scored and wrong in the engine; `flips_to_right` the other way round.
        max_abs_delta_loglikelihood: nats, over all choices of all items; 0 where all are equal bit for bit.
    """

    task: str
    items: int
    scored: float
    engine: float
    flips_to_wrong: int
    flips_to_right: int
    max_abs_delta_loglikelihood: float


class EngineMatch(Record):
    """An exported folder, scored in an engine, against its arm's own scores; `verdict` within the study's budgets."""

    engine: str
    tasks: list[TaskMatch]
    verdict: Verdict


class Exported(Record):
    """export.json.

    Attributes:
        source: the quantized folder, relative to this one where it is near.
        source_sha256: of its weights.
        schemes: how linears are quantized, in words -> how many.
        notes: what an engine does otherwise than what was scored, and what it may not do.
        decoded_by: the package, of somebody else's, that reads the codes as the same numbers; None: none was asked.
        not_checked: proof -> why it could not be made here.
    """

    format: str
    source: str
    source_sha256: str
    compute_dtype: str
    attn_implementation: str
    linears: int
    schemes: dict[str, int]
    packages: dict[str, str]
    notes: list[str]
    codes: CodesProof
    decoded_by: str | None = None
    linears_proof: LinearsProof | None = None
    text_proof: TextProof | None = None
    scored: list[EngineMatch] = Field(default_factory=list)
    not_checked: dict[str, str] = Field(default_factory=dict)
