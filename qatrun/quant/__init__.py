"""Quantizers on a model: the plan, the scales, the fake-quantized linear, attach and detach."""

from qatrun.quant.attach import attach, calibrate, detach, freeze, quantized_linears, replace_linear
from qatrun.quant.linear import FakeQuantLinear
from qatrun.quant.linears import Survey, named_linears, survey
from qatrun.quant.plan import Coverage, QuantPlan, coverage, make_plan
from qatrun.quant.quantized import QuantizedLinear
from qatrun.quant.quantizer import Quantizer
from qatrun.quant.slot import Latest
from qatrun.quant.state import STATISTICS, Mode, ScaleState

__all__ = [
    "STATISTICS",
    "Coverage",
    "FakeQuantLinear",
    "Latest",
    "Mode",
    "QuantPlan",
    "QuantizedLinear",
    "Quantizer",
    "ScaleState",
    "Survey",
    "attach",
    "calibrate",
    "coverage",
    "detach",
    "freeze",
    "make_plan",
    "named_linears",
    "quantized_linears",
    "replace_linear",
    "survey",
]
