"""What to change in a recipe where a cause was found: the advice of a diagnosis as settings of another arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from qatrun.advice import WIDE_WINDOW
from qatrun.formats import FORMATS, Role
from qatrun.quant import QuantPlan
from qatrun.recipe import Arm, QatConfig
from qatrun.recipe.document import deep_merge
from qatrun.records.diagnosis import TensorRecord
from qatrun.scheme import Scaling, Scheme, Slot

Schemes = Mapping[Role, Scheme]
SLOWER = 10.0
SPARED = 0.1  # of the linears, those that keep least
LOOSE = 0.5  # amax over what the scale stands for, in most steps: the scale is twice what it need be


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
        overrides = deep_merge(self.overrides, other.overrides)
        modules = [remedy.overrides.get("qat", {}).get("modules") for remedy in (self, other)]
        if all(modules):  # both of the same arm
            overrides["qat"]["modules"] = [deep_merge(*entries) for entries in zip(*modules, strict=True)]
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
    tensors = [(role, scheme) for schemes in qat.all_schemes for role, scheme in schemes.items()]
    shared = [scheme for role, scheme in tensors if _shares_a_scale(role, scheme)]
    if any(_lags(scheme.scaling) for scheme in shared):
        words = f"delayed scaling by the max of {Scaling.window} steps, renewed each step"
        fitting = {"type": "delayed", "algorithm": "max", "window": Scaling.window, "update_interval": 1}
        yield Remedy(words, _in_all_modules(qat, partial(_scaled, fitting)))
    if any(scheme.limit is not None and scheme.limit < FORMATS[scheme.format].max_finite for scheme in shared):
        yield Remedy("clip: format, the format's own edge", {"qat": {"clip": "format"}})
    if any(s.symmetric and s.target_amax > FORMATS[s.format].target_amax[role] for role, s in tensors):
        yield Remedy("target_amax as the format has it by default", _in_all_modules(qat, _without_targets))
    yield from _always_fitting(qat)


def _always_fitting(qat: QatConfig) -> Iterator[Remedy]:
    tensors = [(role, scheme) for schemes in qat.all_schemes for role, scheme in schemes.items()]
    if any(scheme.scaling.type != "dynamic" for role, scheme in tensors if _shares_a_scale(role, scheme)):
        words = "dynamic scaling of weights and inputs, which always fits"
        yield Remedy(words, _in_all_modules(qat, partial(_scaled, {"type": "dynamic"})))


def _in_all_modules(qat: QatConfig, change: Callable[[Schemes], dict[str, Any]]) -> dict[str, Any]:
    """Overrides that change the section and its entries of `modules`, by what their schemes ask for."""
    changed: dict[str, Any] = change(qat.schemes)
    if qat.modules:
        changed["modules"] = [
            deep_merge(module.model_dump(mode="json"), change(own)) if own else module.model_dump(mode="json")
            for module in qat.modules
            for own in [qat.schemes_of(module)]
        ]
    return {"qat": changed}


def _shares_a_scale(role: Role, scheme: Scheme) -> bool:
    return not scheme.per_row and role != "grad_output"


def _scaled(scaling: Mapping[str, Any], schemes: Schemes) -> dict[str, Any]:
    return {role: {"scaling": dict(scaling)} for role, scheme in schemes.items() if _shares_a_scale(role, scheme)}


def _without_targets(schemes: Schemes) -> dict[str, Any]:
    return {role: {"target_amax": None} for role, scheme in schemes.items() if scheme.symmetric}


def _coarse(schemes: Schemes) -> dict[Role, str]:
    """Role -> the finer granularity that it could have."""
    rows: dict[Role, str] = {"input": "per_token", "weight": "per_channel"}
    return {role: rows[role] for role, scheme in schemes.items() if role in rows and not scheme.per_row}


def _finer(schemes: Schemes) -> dict[str, Any]:
    return {role: {"granularity": granularity, "scaling": None} for role, granularity in _coarse(schemes).items()}


def _in_hif8(schemes: Schemes) -> dict[str, Any]:
    return {"format": "hif8", **{role: {"format": None, "target_amax": None, "symmetric": True} for role in schemes}}


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
    if coarse := {role: granularity for schemes in qat.all_schemes for role, granularity in _coarse(schemes).items()}:
        words = " and ".join(f"{granularity} {role}s" for role, granularity in coarse.items())
        yield Remedy(words, _in_all_modules(qat, _finer))
    if any(record.typical_overshoot is not None and record.typical_overshoot < LOOSE for record in tensors):
        yield from _always_fitting(qat)
    if any(name != "hif8" for name in qat.formats):
        yield Remedy("format hif8, whose range is wider", _in_all_modules(qat, _in_hif8))
    measured = [record for record in tensors if record.sqnr_db is not None]
    worst = sorted(measured, key=lambda record: record.sqnr_db or 0.0)
    linears = list(dict.fromkeys(Slot.parse(record.tensor).linear for record in worst))
    spared = linears[: max(1, round(SPARED * len(plan.linears)))]
    if spared and len(spared) < len(plan.linears):
        ignore = {"qat": {"ignore": [*qat.ignore, *spared]}}
        yield Remedy(f"the {len(spared)} linears that keep least in BF16 ({', '.join(spared)})", ignore)
