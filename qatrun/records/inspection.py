"""inspection.json: what `qatrun inspect` found of every tensor."""

from __future__ import annotations

from typing import Literal

from qatrun.files import Record


class TensorInspection(Record):
    """One tensor that a linear multiplies.

    Attributes:
        low, high: least and largest value.
        outlier_ratio: amax of the largest channel over that of the median one; None where that is zero.
        outliers: channels of an input, or rows of a weight, whose amax is far above the median's, largest first; the first
            few.
        num_outliers: all of them, of `num_channels`.
        scale: of the amax, one for the whole tensor; `sqnr_db` with it. None: nothing is lost.
        typical_sqnr_db: the same of values no larger than the median channel's amax: in that of all of them a few large
            channels, which lose little, hide what they cost the others.
        best_amax: whose scale loses least, `best_sqnr_db` with it; `best_clips` is the share of values beyond it.
        row_sqnr_db: with a scale for each token, or channel of a weight.
        zero_point, asymmetric_sqnr_db: of an INT8 input, with its range on all codes.
        advice: what to change; empty: nothing.
    """

    tensor: str
    role: Literal["input", "weight"]
    low: float
    high: float
    num_channels: int
    outlier_ratio: float | None
    outliers: list[int]
    num_outliers: int
    scale: float
    sqnr_db: float | None
    typical_sqnr_db: float | None
    best_amax: float
    best_sqnr_db: float | None
    best_clips: float
    row_sqnr_db: float | None
    zero_point: int | None
    asymmetric_sqnr_db: float | None
    advice: list[str]


class Inspection(Record):
    """Tensors worst first."""

    model: str
    data: str
    format: str
    num_tokens: int
    tensors: list[TensorInspection]
    answer: str
