"""Quantizers on a model: the plan, the scales, the fake-quantized linear, attach and detach, calibration."""

from qatrun.quant.attach import attach, detach, freeze, quantized_linears, replace_linear
from qatrun.quant.calibration import calibrate, calibrated_plan, finest_plan, input_histograms, statistics
from qatrun.quant.folding import Fold, find_folds
from qatrun.quant.linear import FakeQuantLinear
from qatrun.quant.linears import Survey, named_linears, survey
from qatrun.quant.plan import Coverage, QuantPlan, coverage, make_plan
from qatrun.quant.qtensor import QTensor
from qatrun.quant.quantized import QuantizedLinear
from qatrun.quant.quantizer import Latest, Quantizer
from qatrun.quant.scales import Scales
from qatrun.quant.smoothing import folded, smooth
from qatrun.quant.state import Mode, QuantState, ResumableState
from qatrun.quant.tally import STATISTICS

__all__ = [
    "STATISTICS",
    "Coverage",
    "FakeQuantLinear",
    "Fold",
    "Latest",
    "Mode",
    "QTensor",
    "QuantPlan",
    "QuantState",
    "QuantizedLinear",
    "Quantizer",
    "ResumableState",
    "Scales",
    "Survey",
    "attach",
    "calibrate",
    "calibrated_plan",
    "coverage",
    "detach",
    "find_folds",
    "finest_plan",
    "folded",
    "freeze",
    "input_histograms",
    "make_plan",
    "named_linears",
    "quantized_linears",
    "replace_linear",
    "smooth",
    "statistics",
    "survey",
]
