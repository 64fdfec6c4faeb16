"""Arms to segments: which stretches of training a study needs, each trained once.

Arms whose model, data and schedule are equal share a trunk, the BF16 phase up to `warmup.steps`. The trunk records the
amax history of everything that any of its arms will quantize, over the longest window, so every arm starts with a full one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qatrun.layout import TRUNK
from qatrun.quant import QuantPlan
from qatrun.ranks import started
from qatrun.recipe import Arm, QatConfig
from qatrun.scheme import Scheme, Slot
from qatrun.train.segment import Segment

TRAINED_SECTIONS = {"model", "data", "train", "warmup"}
# Keys of `train` that no number depends on.
BOOKKEEPING = {"seeds", "save_every", "keep_last"}


@dataclass(frozen=True)
class ArmSegments:
    """How an arm comes about: its trunk, None where it starts from the pretrained model, and its own stretch."""

    trunk: Segment | None
    own: Segment


def plan_segments(arms: Mapping[str, Arm], plans: Mapping[str, QuantPlan | None], folder: Path) -> list[ArmSegments]:
    """The segments of each arm that trains, in the order of the arms; arms that share a trunk hold the same one."""
    arms = {name: arm for name, arm in arms.items() if arm.trains}
    keys = _trunk_keys(arms)
    trunks = {
        key: _trunk_segment(key, [arms[name] for name in arms if keys[name] == key], plans, folder)
        for key in dict.fromkeys(keys.values())
    }
    return [
        ArmSegments(trunks[keys[name]], _arm_segment(arm, plans[name], trunks[keys[name]], folder))
        for name, arm in arms.items()
    ]


def matched_settings(arm: Arm) -> dict[str, Any]:
    """What an arm's training must have in common with its twin's, besides the data consumed: all that decides where
    training without quantization would end."""
    return {
        "model": arm.model.model_dump(mode="json"),
        **arm.train.model_dump(mode="json", exclude={"micro_batch_size", "gradient_checkpointing", *BOOKKEEPING}),
        "warmup": arm.warmup.model_dump(mode="json"),
    }


def observation_plan(plans: list[QuantPlan]) -> QuantPlan | None:
    """A plan under which quantizers see everything that these plans quantize, each tensor once and over the longest window
    of any."""
    if not plans:
        return None
    observed: dict[Slot, Scheme] = {}
    for plan in plans:
        observed_as = plan.observed_as()
        for slot, scheme in plan.slots().items():
            first = observed.get(observed_as[slot], replace(scheme, clip="format", ste="clipped"))
            window = max(first.scaling.window, scheme.scaling.window)
            scaling, symmetric = replace(first.scaling, window=window), first.symmetric and scheme.symmetric
            observed[observed_as[slot]] = replace(first, scaling=scaling, symmetric=symmetric)
    groups = {name: group for plan in plans for name, group in plan.input_group.items()}
    names = dict.fromkeys(name for plan in plans for name in plan.linears)
    roles = {name: {role: None for plan in plans for role in plan.schemes.get(name, {})} for name in names}
    schemes = {
        name: {role: observed[Slot(groups[name] if role == "input" else name, role)] for role in roles[name]}
        for name in names
    }
    return QuantPlan(schemes, groups)


def _trunk_keys(arms: Mapping[str, Arm]) -> dict[str, str]:
    """Arm -> hash of what its trunk depends on, the unit of the amax history included, which a BF16 arm leaves open."""
    shared = {name: _digest(_settings(arm)) for name, arm in arms.items()}
    units: dict[str, str] = {}
    for name, arm in arms.items():
        if arm.qat is not None:
            units.setdefault(shared[name], arm.qat.scaling.unit)
    return {
        name: _digest([shared[name], arm.qat.scaling.unit if arm.qat is not None else units.get(shared[name])])
        for name, arm in arms.items()
    }


def _trunk_segment(key: str, arms: list[Arm], plans: Mapping[str, QuantPlan | None], folder: Path) -> Segment | None:
    if not arms[0].warmup.steps:
        return None
    wanted = [plan for arm in arms if (plan := plans[arm.name]) is not None]
    plan = observation_plan(wanted)
    # Of all that it observes, too: an arm that is added later, and needs another linear or a longer window, finds no trunk
    # that has seen too little.
    identity = _digest([key, plan.to_dict() if plan else None, *_rounds(arm.qat for arm in arms)])
    return Segment(
        name="trunk",
        arm=arms[0],
        folder=folder / f"{TRUNK}{identity[:8]}",
        plan=plan,
        quantizes=False,
        last_step=arms[0].warmup.steps,
        switch_step=arms[0].warmup.steps,
        trunk=None,
        identity=identity,
    )


def _arm_segment(arm: Arm, plan: QuantPlan | None, trunk: Segment | None, folder: Path) -> Segment:
    return Segment(
        name=arm.name,
        arm=arm,
        folder=folder / arm.name,
        plan=plan,
        quantizes=plan is not None,
        last_step=arm.train.steps,
        switch_step=arm.train.steps if arm.switch_step is None else arm.switch_step,
        trunk=trunk.folder if trunk else None,
        twin=folder / arm.twin if arm.twin is not None else None,
        identity=_digest([_settings(arm), None if arm.qat is None else _trained_with(arm.qat), *_rounds([arm.qat])]),
    )


def _trained_with(qat: QatConfig) -> dict[str, Any]:
    """What of the section training depends on."""
    return qat.model_dump(mode="json", exclude=None if qat.init == "ptq" else {"calibration"})


def _rounds(qats: Iterable[QatConfig | None]) -> list[int]:
    """How many micro-batches a unit of the history holds, where that is one for each process: another window with other
    processes. Nothing where it holds a whole step."""
    of_micro_batches = any(qat is not None and qat.scaling.unit == "microbatch" for qat in qats)
    return [started().size] if of_micro_batches and started().size > 1 else []


def _settings(arm: Arm) -> dict[str, Any]:
    """What decides where training without quantization goes."""
    return arm.model_dump(mode="json", include=TRAINED_SECTIONS, exclude={"train": BOOKKEEPING})


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
