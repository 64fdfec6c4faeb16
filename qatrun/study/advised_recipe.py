"""The recipe of a candidate: what is measured of it, and what is written for the one that is advised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qatrun.recipe import Arm, QatConfig, Recipe, load_recipe
from qatrun.recipe.shipped import TEMPLATE


@dataclass(frozen=True)
class Kind:
    """A format with granularities.

    Attributes:
        calibration: keys of `qat.calibration`.
        kept: linears to leave in BF16.
    """

    name: str
    format: str
    weight: str = "per_tensor"
    input: str = "per_tensor"
    calibration: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


KINDS = (
    *(
        Kind(f"{name}-{weight.removeprefix('per_')}-{of_input.removeprefix('per_')}", name, weight, of_input)
        for name in ("hif8", "fp8_e4m3", "int8")
        for weight in ("per_tensor", "per_channel")
        for of_input in ("per_tensor", "per_token")
    ),
    Kind("mxfp8", "fp8_e4m3", "per_block", "per_block"),
    Kind("int8-channel-tensor-mse", "int8", "per_channel", calibration={"input": "mse"}),
    Kind("int8-channel-tensor-smooth", "int8", "per_channel", calibration={"input": "mse", "smooth": 0.5}),
)


def advised_tree(
    recipe: Recipe, arm: Arm, kind: Kind, budget: float, hardware: str | None, *, trains: bool
) -> dict[str, Any]:
    """A whole recipe, but for what is at its default: that of one of a recipe's arms with this kind of quantization, by
    calibration alone, or trained beside its BF16 twin and calibration of that.

    Args:
        budget: nats a token, that it is judged by.
    """
    qat = arm.qat or QatConfig()
    own: dict[str, Any] = {"format": kind.format}
    own |= {role: {"granularity": name} for role, name in (("weight", kind.weight), ("input", kind.input))}
    own["calibration"] = {"sequences": qat.calibrating.sequences, **kind.calibration}
    in_bf16 = [{"match": list(kind.kept), "format": None}] if kind.kept else []
    own["modules"] = [*in_bf16, *(module.model_dump(mode="json") for module in qat.modules)]
    # A recipe of calibration alone has no training of its own.
    training = arm if arm.train.steps else load_recipe(TEMPLATE)
    shared = {"model": arm.model, "data": arm.data, "train": training.train, "warmup": training.warmup, "qat": qat}
    shared |= {"monitor": arm.monitor, "eval": recipe.eval, "diagnose": recipe.diagnose}
    tree: dict[str, Any] = {
        key: section.model_dump(mode="json", exclude_defaults=True) for key, section in shared.items()
    }
    dropped = ("init", "weight", "input", "calibration", "modules", *(() if trains else ("start_step",)))
    tree["qat"] = {key: value for key, value in tree["qat"].items() if key not in dropped} | own
    arms: dict[str, Any] = {kind.format: {}}
    if trains:
        arms = {"bf16": {"qat": None}, **arms, f"{kind.format}-ptq": {"method": "ptq"}}
    else:
        tree["train"].pop("seeds", None)
    tree = {"name": f"{recipe.name}-advised", **tree, "method": "qat" if trains else "ptq", "arms": arms}
    tree["budget"] = {**recipe.budget, "perplexity": float(f"{100 * math.expm1(budget):.4g}")}
    if hardware is not None:
        tree["target"] = {"hardware": hardware}
    return tree | {"output_dir": recipe.output_dir}
