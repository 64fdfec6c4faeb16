"""What quantizing writes: plan.json and histograms.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict  # pydantic reads it before Python 3.12

from qatrun.files import Record
from qatrun.records.values import Step


class HistogramRecord(Record):
    """How the values of a tensor are spread over the grid.

    Attributes:
        log2_edges: of the bins, of |x| / scale.
        counts: values in each bin; `num_zero` zeros are in none.
    """

    tensor: str
    format: str
    scale: float
    target_amax: Annotated[float, Field(gt=0)]
    log2_edges: Annotated[list[float], Field(min_length=2)]
    counts: list[Step]
    num_zero: Step
    num_values: Annotated[int, Field(ge=1)]


class Histograms(Record):
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
