"""HiF8 in the layout that Huawei's inference recipes (cann-recipes-infer) read on Ascend; never run here.

A compressed-tensors folder whose `weight` are uint8 HiF8 codes [out, in] beside `weight_scale` float32 [out, 1]. Inputs are
cast as they are, without a scale, and scales are rounded to bfloat16 when loaded. So it is only for arms that were trained
like that: `qat.input.scaling.type: none`, and weight scales that are powers of two.

Its `quantization_config` says the same words that mean E4M3 to vLLM; hif8.json beside it says that it is HiF8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatrun.export import hif8
from qatrun.export.folder import Stored, other_tensors, stored_linears, write_model
from qatrun.export.linears import input_schemes, linear_problems
from qatrun.export.weights import WEIGHTS
from qatrun.files import write_json
from qatrun.quant import QuantPlan

NAME = "hif8-ascend"
ENGINES: tuple[str, ...] = ()
FORMULA = (
    "y = (decode(weight) @ decode(encode(x))^T) * weight_scale + bias, accumulated in float32; inputs have no scale"
)


def problems(plan: QuantPlan, model: nn.Module) -> Iterator[str]:
    """What of a plan cannot be written, and what to do instead."""
    yield from hif8.problems(plan, model)
    if any(scheme.scaling.type != "none" for scheme in input_schemes(plan)):
        yield "Ascend casts inputs to HiF8 without a scale (train with qat.input.scaling.type: none; --to hif8 keeps scales)"
    scalings = [plan.schemes[name]["weight"].scaling for name in plan.linears]
    if any(scaling.type != "none" and not scaling.to_power_of_two for scaling in scalings):
        yield "Ascend rounds weight scales to bfloat16 (train with qat.weight.scaling.rounding: power_of_two)"
    yield from linear_problems(NAME, plan, model)


def notes(plan: QuantPlan) -> Iterator[str]:
    """What engines do otherwise than what was scored, or may not do."""
    yield "the layout is read from Huawei's public sources; nothing was run on an Ascend NPU"
    yield "vLLM on other hardware would take the codes for E4M3: serve it with Huawei's inference recipes alone"


def save(model: Any, tokenizer: Any, plan: QuantPlan, folder: Path) -> None:
    """Fill the folder from a frozen model (see `qatrun.quant.freeze`)."""
    tensors = other_tensors(model)
    for name, linear in stored_linears(model).items():
        tensors |= hif8.weight_tensors(name, linear, model.get_submodule(name).bias, per_channel=True)
    ignored = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    shared = {"num_bits": 8, "type": "float", "symmetric": True}
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "output_activations": None,
                "weights": shared | {"strategy": "channel", "dynamic": False},
                "input_activations": shared | {"strategy": "tensor", "dynamic": True},
            }
        },
    }
    write_model(model, tokenizer, tensors, folder, {"quantization_config": config})
    write_json(folder / hif8.DESCRIPTION_FILE, hif8.description(plan, FORMULA))


def read(folder: Path) -> dict[str, Stored]:
    """The quantized linears of a folder; the scale of inputs is 1."""
    return {name: linear._replace(input_scale=torch.ones(())) for name, linear in hif8.read(folder, WEIGHTS).items()}


def decoded_by(linears: Mapping[str, Stored]) -> str | None:
    """As of `hif8`."""
    return hif8.decoded_by(linears)
