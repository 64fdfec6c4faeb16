"""AscendV1: INT8 as vllm-ascend reads it with `--quantization ascend`, in msmodelslim's layout; never run here.

quant_model_weights.safetensors     per quantized linear N [out, in]
  N.weight         int8 [out, in]          N.weight_scale  float32 [out, 1]
  N.weight_offset  float32 [out, 1], 0
where inputs have one scale (W8A8; with a scale a token, W8A8_DYNAMIC, this is absent)
  N.input_scale    float32 [1]             N.deq_scale     float32 [out], input_scale * weight_scale
  N.input_offset   float32 [1]             N.quant_bias    int32 [out], bias / deq_scale - input_offset * sum of codes
quant_model_description.json        name of each tensor -> W8A8, W8A8_DYNAMIC or FLOAT
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatrun.export.folder import Stored, other_tensors, stored_linears, write_model
from qatrun.export.linears import expert_problems, input_problems, input_schemes, linear_problems
from qatrun.export.weights import StoredTensors
from qatrun.files import write_json
from qatrun.quant import QuantPlan

NAME = "ascend-v1"
ENGINES: tuple[str, ...] = ()
WEIGHTS_PATTERN = "quant_model_weights{suffix}.safetensors"
DESCRIPTION_FILE = "quant_model_description.json"
STATIC, DYNAMIC, UNQUANTIZED = "W8A8", "W8A8_DYNAMIC", "FLOAT"


def problems(plan: QuantPlan, model: nn.Module) -> Iterator[str]:
    """What of a plan cannot be written, and what to do instead."""
    yield from expert_problems(NAME, plan, model)
    formats = {plan.schemes[name][role].format for name in plan.linears for role in ("weight", "input")}
    for format_name in sorted(formats - {"int8"}):
        nearest = "hif8-ascend" if format_name == "hif8" else "compressed-tensors"
        yield f"{NAME} is INT8 here, and this is {format_name} (--to {nearest}, or train int8)"
    for scheme in input_schemes(plan):
        yield from input_problems(scheme)
    yield from linear_problems(NAME, plan, model)


def notes(plan: QuantPlan) -> Iterator[str]:
    """What engines do otherwise than what was scored, or may not do."""
    yield "the layout is read from the public sources of msmodelslim and vllm-ascend; nothing was run on an Ascend NPU"
    if any(not scheme.per_row for scheme in input_schemes(plan)):
        yield "biases are rounded to whole units of deq_scale, and symmetric inputs below -127.5 s are clipped at -128 s"


def save(model: Any, tokenizer: Any, plan: QuantPlan, folder: Path) -> None:
    """Fill the folder from a frozen model (see `qatrun.quant.freeze`)."""
    tensors = other_tensors(model)
    kinds: dict[str, str] = dict.fromkeys(tensors, UNQUANTIZED)
    for name, linear in stored_linears(model).items():
        bias = model.get_submodule(name).bias
        of_linear = _tensors(linear, bias)
        kinds |= dict.fromkeys((f"{name}.{leaf}" for leaf in of_linear), _kind(linear))
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in of_linear.items()}
        if bias is not None:
            tensors[f"{name}.bias"], kinds[f"{name}.bias"] = bias, UNQUANTIZED
    write_model(model, tokenizer, tensors, folder, {}, pattern=WEIGHTS_PATTERN)
    whole = {_kind(linear) for linear in stored_linears(model).values()}
    main = whole.pop() if len(whole) == 1 else STATIC
    write_json(folder / DESCRIPTION_FILE, {"model_quant_type": main, "version": "1.0.0", "group_size": 0, **kinds})


def read(folder: Path) -> dict[str, Stored]:
    """The quantized linears of a folder."""
    tensors = StoredTensors(folder, WEIGHTS_PATTERN)
    found: dict[str, Stored] = {}
    for name in (key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")):
        scale, offset = tensors.get(f"{name}.input_scale"), tensors.get(f"{name}.input_offset")
        found[name] = Stored(
            tensors[f"{name}.weight"],
            tensors[f"{name}.weight_scale"].flatten(),
            None if scale is None else scale.reshape(()),
            None if offset is None else offset.reshape(()).to(torch.int8),
        )
    return found


def decoded_by(linears: Mapping[str, Stored]) -> str | None:
    """Nobody need say what an integer means."""
    return None


def _kind(linear: Stored) -> str:
    return DYNAMIC if linear.input_scale is None else STATIC


def _tensors(linear: Stored, bias: Tensor | None) -> dict[str, Tensor]:
    """Leaf -> tensor of a linear."""
    scale = linear.weight_scale.unsqueeze(1).clone(memory_format=torch.contiguous_format)
    tensors = {"weight": linear.codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
    if linear.input_scale is None:
        return tensors
    deq_scale = linear.input_scale * linear.weight_scale
    of_bias = 0.0 if bias is None else bias.double() / deq_scale.double()
    quant_bias = of_bias - linear.codes.double().sum(1) * linear.zero
    return tensors | {
        "input_scale": linear.input_scale.reshape(1).clone(),
        "input_offset": torch.tensor([float(linear.zero)]),
        "deq_scale": deq_scale.contiguous(),
        "quant_bias": quant_bias.round().to(torch.int32),
    }
