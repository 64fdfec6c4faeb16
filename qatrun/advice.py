"""Remedies: what to change where a run goes wrong, in words that alarms and diagnosis share. Torch-free."""

from __future__ import annotations

from qatrun.scheme import Scheme

FORGETTING = "lower train.learning_rate"
INPUT = "look at data.train: other text than meant, or tokens of another tokenizer"
DIVERGENCE = "look for saturated or coarse tensors before the learning rate, and compare more seeds (train.seeds)"
UNEXPLAINED = "compare more seeds (train.seeds) before blaming the format"
QUANTIZATION = "look for saturated or coarse tensors, or leave sensitive layers in BF16"
TOO_LARGE = "scales stand for an amax of long ago; shorten qat.scaling.window, or use dynamic scaling"
RESOLUTION = (
    "few values take most of the grid, or most values are clipped; try per_token inputs, per_channel weights, "
    "a wider format such as hif8, or leave these layers in BF16"
)

WIDE_WINDOW = 16
# Amax over its estimate. The estimate follows an amax that grows: 1.25 in every step would make it 80 times as large in 20.
STEADY = 1.25
NOT_A_TREND = 2.0  # amax does not double from one step to the next for long


def against_saturation(scheme: Scheme | None, overshoot: float, *, steady: bool = False) -> str:
    """What to change where tensors of this scheme saturate.

    Args:
        overshoot: the largest of amax over its estimate.
        steady: it is above STEADY in most steps.
    """
    if scheme is None:
        return "scale estimates do not fit"
    scaling = scheme.scaling
    edge = "; or clip: format, a wider edge" if scheme.clip == "target" and scheme.symmetric else ""
    if scaling.type != "delayed":
        return f"scaling {scaling.type} does not follow the tensor; use delayed scaling with algorithm max{edge}"
    if scaling.algorithm == "max" and scaling.window >= WIDE_WINDOW and scaling.update_interval == 1:
        if steady:
            return f"scales are too small by a steady factor, which no trend explains; check where they come from{edge}"
        if overshoot > NOT_A_TREND:
            return f"amax jumps above all that a window of {scaling.window} has seen; use dynamic scaling{edge}"
        lower = "train.learning_rate or target_amax" if scheme.symmetric else "train.learning_rate"
        return f"amax grows faster than a window of {scaling.window} sees; lower {lower}{edge}"
    changes = [
        "use algorithm max" if scaling.algorithm != "max" else "",
        f"widen window ({scaling.window})" if scaling.window < WIDE_WINDOW else "",
        "update_interval 1" if scaling.update_interval > 1 else "",
    ]
    return f"scale estimates lag; in qat.scaling {', '.join(filter(None, changes))}{edge}"
