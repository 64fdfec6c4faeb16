"""Quantizers on a model: the plan, the scales, the fake-quantized linear, attach and detach, calibration."""

from qatrun.quant.attach import attach, detach, freeze, mark_quantized, quantized_linears, replace_linears
from qatrun.quant.calibration import calibrate, calibrated_plan, finest_plan, input_histograms, statistics
from qatrun.quant.coded import CodedWeight
from qatrun.quant.coverage import Coverage, coverage
from qatrun.quant.expert_weights import Experts, experts_of_linears
from qatrun.quant.folding import Fold, find_folds
from qatrun.quant.linear import FakeQuantLinear
from qatrun.quant.linears import Survey, kinds, named_linears, survey
from qatrun.quant.plan import QuantPlan, idle_assignments, make_plan
from qatrun.quant.qtensor import QTensor
from qatrun.quant.quantized import QuantizedLinear
from qatrun.quant.quantizer import Latest, Quantizer
from qatrun.quant.scales import Scales
from qatrun.quant.smoothing import folded, smooth
from qatrun.quant.state import Mode, QuantState, ResumableState
from qatrun.quant.tally import STATISTICS

__all__ = [
    "STATISTICS",
    "CodedWeight",
    "Coverage",
    "Experts",
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
    "experts_of_linears",
    "find_folds",
    "finest_plan",
    "folded",
    "freeze",
    "idle_assignments",
    "input_histograms",
    "kinds",
    "make_plan",
    "mark_quantized",
    "named_linears",
    "quantized_linears",
    "replace_linears",
    "smooth",
    "statistics",
    "survey",
]
