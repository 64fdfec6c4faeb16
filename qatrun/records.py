"""What lies in files of a study: a type for each, which `files.read_json` checks. Keys that are not named here are let
through; NotRequired are those that a folder of an earlier version, or of another kind of arm, lacks.

    <study>/comparison.json  diagnosis.json  seeds.json  environment.json
    <arm>/result.json  metrics.jsonl  alarms.jsonl  histograms.json  quantized/plan.json  eval/scores.json
    <arm>/checkpoints/<step>/progress.json
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic reads it before Python 3.12

Number = Annotated[float, Field(allow_inf_nan=False)]
Step = Annotated[int, Field(ge=0, lt=2**31)]
Verdict = Literal["within", "inconclusive", "exceeds"]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
Strings = list[str]


class Environment(TypedDict):
    """environment.json of a study, as the page shows it."""

    date: NotRequired[str]
    packages: NotRequired[dict[str, str]]


class StudyEnvironment(TypedDict):
    """environment.json as only qatrun writes it.

    Attributes:
        inputs: path of a text or model -> SHA-256 of its content when the study began.
    """

    date: str
    command: Strings
    packages: dict[str, str]
    platform: str
    inputs: NotRequired[dict[str, str]]


class MetricsRow(TypedDict):
    """A line of metrics.jsonl: one optimizer step."""

    step: Annotated[int, Field(ge=1, lt=2**31)]
    phase: Literal["bf16", "qat"]
    loss: Number
    learning_rate: NotRequired[float]
    grad_norm: NotRequired[float]
    num_saturated: NotRequired[int]
    tokens: NotRequired[int]
    kl_off: NotRequired[float]
    kl_on: NotRequired[float]


class AlarmRow(TypedDict):
    """A line of alarms.jsonl."""

    step: Step
    kind: str
    text: str
    tensor: NotRequired[str | None]


class Cost(TypedDict):
    """Of training an arm, the trunk included."""

    seconds: float
    peak_memory_bytes: int


class TrunkResult(TypedDict):
    """result.json of a trunk."""

    steps: int
    data_hash: str
    seconds: float
    peak_memory_bytes: int


class Result(TypedDict):
    """result.json of a folder with scores, the start model's or an arm's, as far as the page shows it."""

    arm: str
    perplexity: dict[str, float]
    twin: NotRequired[str | None]
    coverage: NotRequired[str | None]


class Match(TypedDict):
    """In what an arm must agree with its twin; model, warmup and all of `train` that decides a number are in it, too."""

    steps: Annotated[int, Field(ge=1)]
    seed: int
    data_hash: str


class ArmResult(TypedDict):
    """result.json of a trained arm.

    Attributes:
        weights: weights file or plan, relative to the arm's folder -> SHA-256 of what was scored.
    """

    arm: str
    perplexity: dict[str, float]
    twin: str | None
    coverage: str | None
    match: Match
    cost: Cost
    sizes: dict[str, int]
    weights: NotRequired[dict[str, str]]


class Progress(TypedDict):
    """progress.json of a checkpoint, as far as it has a form of its own."""

    step: Step


class TaskSummary(TypedDict):
    """A task in scores.json; its items are in items.parquet."""

    metric: str
    num_fewshot: Step
    num_truncated: Step
    num_answer_tokens: NotRequired[Step]  # an earlier version did not count them


class ScoresSummary(TypedDict):
    """scores.json."""

    settings: dict[str, Any]
    tasks: dict[str, TaskSummary]
    items_sha256: str


class TaskComparison(TypedDict):
    """A task of one arm against its twin; see `evaluate.comparison.TaskComparison`."""

    task: str
    metric: str
    num_fewshot: int
    num_items: int
    start: float | None
    twin: float
    arm: float
    arm_off: float | None
    drop_pp: float
    drop_relative_percent: float | None
    ci95_pp: Interval
    mcnemar_p: float
    flips_to_wrong: int
    flips_to_right: int
    mean_abs_delta_loglikelihood: float
    detectable_drop_pp: float
    budget_pp: float
    verdict: Verdict
    items_to_settle: int | None


class ArmComparison(TypedDict):
    """The tasks of one arm."""

    tasks: list[TaskComparison]
    verdict: Verdict
    conditional_on: str


class PairRecord(TypedDict):
    """An arm beside its twin; see `study.pairs.Pair`."""

    arm: str
    twin: str
    comparison: ArmComparison
    loss_ape_percent: dict[str, float]
    perplexity: dict[str, float]
    cost: dict[str, Cost]
    sizes: dict[str, int]
    coverage: str | None
    mismatches: Strings


class StudyComparison(TypedDict):
    """comparison.json."""

    verdict: Verdict | None
    pairs: list[PairRecord]


Effect = TypedDict(
    "Effect",
    {
        "name": str,
        "from": str,
        "to": str,
        "drop_pp": float,
        "ci95_pp": Interval,
        "loglikelihood": float,
        "ci95_loglikelihood": Interval,
        "text_loglikelihood": float,
        "ci95_text_loglikelihood": Interval,
        "log_perplexity": float | None,
    },
)


class WorstTensor(TypedDict):
    """A tensor that a diagnosis shows."""

    tensor: str
    clip_fraction: float
    overshoot: float
    sqnr_db: float | None
    since_step: int | None


class ArmDiagnosis(TypedDict):
    """One arm's."""

    sentence: str
    findings: Strings
    effects: NotRequired[list[Effect]]
    tasks: NotRequired[dict[str, list[Effect]]]
    accuracy: NotRequired[dict[str, dict[str, float]]]
    perplexity: NotRequired[dict[str, float]]
    worst_tensors: NotRequired[list[WorstTensor]]


class StudyDiagnosis(TypedDict):
    """diagnosis.json."""

    sentence: str
    arms: dict[str, ArmDiagnosis]


class TaskOfSeeds(TypedDict):
    """Accuracies of an arm over seeds, and drops against its twin; those are None without one."""

    accuracy: list[float]
    mean: float
    sd: float | None
    drop_pp: list[float] | None
    drop_mean_pp: float | None
    drop_sd_pp: float | None
    drop_ci95_pp: Interval | None


class ArmOfSeeds(TypedDict):
    """One arm over seeds."""

    twin: NotRequired[str | None]
    tasks: dict[str, TaskOfSeeds]
    all_tasks: TaskOfSeeds
    perplexity: NotRequired[list[float]]
    loss_ape_percent: NotRequired[dict[str, list[float] | None] | None]
    findings: NotRequired[list[Strings] | None]


class Contrast(TypedDict):
    """Two arms beside each other, over seeds."""

    name: str
    a: str
    b: str
    difference_pp: float
    ci95_pp: Interval
    per_seed_pp: list[float]
    loss_ape_percent: NotRequired[list[float] | None]
    answer: str


class Seeds(TypedDict):
    """seeds.json."""

    seeds: list[int]
    verdict: NotRequired[Verdict | None]
    arms: dict[str, ArmOfSeeds]
    contrasts: NotRequired[list[Contrast] | None]


class HistogramRecord(TypedDict):
    """How the values of a tensor are spread over the grid."""

    tensor: str
    format: str
    scale: float
    target_amax: Annotated[float, Field(gt=0)]
    log2_edges: Annotated[list[float], Field(min_length=2)]
    counts: list[Step]
    num_zero: Step
    num_values: Annotated[int, Field(ge=1)]


class Histograms(TypedDict):
    """histograms.json."""

    tensors: list[HistogramRecord]


class Versioned(TypedDict):
    """plan.json, as far as a later version's still is one."""

    format_version: int


class Quantized(Versioned):
    """plan.json of a quantized folder; `quant.QuantPlan` reads the plan."""

    compute_dtype: Literal["float32", "bfloat16"]
    attn_implementation: Literal["sdpa", "eager"]
    plan: dict[str, Any]
