"""What to change in a recipe where a cause was found: the advice of a diagnosis as settings of another arm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qatrun.advice import WIDE_WINDOW
from qatrun.formats import FORMATS
from qatrun.quant import QuantPlan
from qatrun.recipe import Arm
from qatrun.recipe.document import deep_merge
from qatrun.records.diagnosis import TensorRecord
from qatrun.scheme import Scaling, Slot

SLOWER = 10.0
SPARED = 0.1  # of the linears, those that keep least


@dataclass(frozen=True)
class Remedy:
    """One thing to try.

    Attributes:
        text: what it changes, in words.
        overrides: laid over those of the arm.
        of_training: whether the arm's twin has to be trained so, too.
    """

    text: str
    overrides: Mapping[str, Any]
    of_training: bool = False

    def __add__(self, other: Remedy) -> Remedy:
        overrides = deep_merge(dict(self.overrides), dict(other.overrides))
        return Remedy(f"{self.text}; {other.text}", overrides, self.of_training or other.of_training)


def remedies(cause: str, arm: Arm, plan: QuantPlan, tensors: list[TensorRecord]) -> list[Remedy]:
    """What can be tried against a cause, the likeliest cure first; none where there is nothing a recipe can say.

    Args:
        plan: of the arm as it was trained.
        tensors: its quantized tensors.
    """
    assert arm.qat is not None
    tries = {"forgetting": _against_forgetting, "saturation": _against_saturation}
    if cause == "resolution":
        return list(_against_resolution(arm, plan, tensors))
    return list(tries[cause](arm)) if cause in tries else []


def _against_forgetting(arm: Arm) -> Iterator[Remedy]:
    for factor in (SLOWER, SLOWER**2):
        rate = arm.train.learning_rate / factor
        overrides: dict[str, Any] = {"train": {"learning_rate": rate}}
        if arm.warmup.learning_rate is not None:
            overrides["warmup"] = {"learning_rate": arm.warmup.learning_rate / factor}
        yield Remedy(
            f"train.learning_rate {rate:g} in place of {arm.train.learning_rate:g}", overrides, of_training=True
        )


def _against_saturation(arm: Arm) -> Iterator[Remedy]:
    qat = arm.qat
    assert qat is not None
    roles = [role for role, scheme in qat.schemes.items() if not scheme.per_row and role != "grad_output"]
    schemes = [qat.schemes[role] for role in roles]
    fitting = {"type": "delayed", "algorithm": "max", "window": Scaling.window, "update_interval": 1}
    if any(_lags(scheme.scaling) for scheme in schemes):
        words = f"delayed scaling by the max of {Scaling.window} steps, renewed each step"
        yield Remedy(words, {"qat": {key: {"scaling": fitting} for key in roles}})
    if any(scheme.limit is not None and scheme.limit < FORMATS[scheme.format].max_finite for scheme in schemes):
        yield Remedy("clip: format, the format's own edge", {"qat": {"clip": "format"}})
    own = {role: FORMATS[scheme.format].target_amax[role] for role, scheme in qat.schemes.items() if scheme.symmetric}
    if any(qat.schemes[role].target_amax > target for role, target in own.items()):
        defaults = {role: {"target_amax": None} for role in own}
        yield Remedy("target_amax as the format has it by default", {"qat": defaults})
    if any(scheme.scaling.type != "dynamic" for scheme in schemes):
        dynamic = {"scaling": {"type": "dynamic"}}
        yield Remedy("dynamic scaling of weights and inputs, which always fits", {"qat": dict.fromkeys(roles, dynamic)})


def _lags(scaling: Scaling) -> bool:
    """Whether its estimates may be behind the tensor."""
    if scaling.type == "dynamic":
        return False
    steady = scaling.algorithm == "max" and scaling.window >= WIDE_WINDOW and scaling.update_interval == 1
    return scaling.type != "delayed" or not steady


def _against_resolution(arm: Arm, plan: QuantPlan, tensors: list[TensorRecord]) -> Iterator[Remedy]:
    qat = arm.qat
    assert qat is not None
    easier = {"input": "mse", "smooth": 0.5}
    if not arm.trains and not qat.schemes["input"].per_row and qat.calibrating.smooth is None:
        yield Remedy("inputs smoothed by 0.5, scaled for the least error", {"qat": {"calibration": easier}})
    rows = {"input": "per_token", "weight": "per_channel"}
    coarse = {role: rows[role] for role, scheme in qat.schemes.items() if role in rows and not scheme.per_row}
    if coarse:
        words = " and ".join(f"{granularity} {role}s" for role, granularity in coarse.items())
        finer = {role: {"granularity": granularity, "scaling": None} for role, granularity in coarse.items()}
        yield Remedy(words, {"qat": finer})
    if qat.format != "hif8":
        defaults = {key: {"format": None, "target_amax": None, "symmetric": True} for key in qat.schemes}
        yield Remedy("format hif8, whose range is wider", {"qat": {"format": "hif8", **defaults}})
    measured = [record for record in tensors if record.sqnr_db is not None]
    worst = sorted(measured, key=lambda record: record.sqnr_db or 0.0)
    linears = list(dict.fromkeys(Slot.parse(record.tensor).linear for record in worst))
    spared = linears[: max(1, round(SPARED * len(plan.linears)))]
    if spared and len(spared) < len(plan.linears):
        ignore = {"qat": {"ignore": [*qat.ignore, *spared]}}
        yield Remedy(f"the {len(spared)} linears that keep least in BF16 ({', '.join(spared)})", ignore)
