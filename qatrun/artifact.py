"""The quantized model as a folder: 8-bit codes and scales in safetensors, with the plan.

    quantized/
      model.safetensors    codes of quantized weights (uint8; int8 for INT8), their scales; the rest in the compute dtype
      plan.json            which linears, which formats, where values are clipped, the compute dtype, the attention kernel
      config.json, tokenizer files, generation_config.json

Reading it back gives the very model that was written: grid values are exact in the compute dtype and codes are exact
grid values, so nothing is rounded twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from qatrun.errors import InputError, Problem
from qatrun.model import architecture, from_tensors, load_tokenizer, save_description
from qatrun.numerics import decode, encode, inverse_scale
from qatrun.quant import Latest, QuantizedLinear, Quantizer, QuantPlan, quantized_linears, replace_linear
from qatrun.recipe import ModelConfig

FOLDER = "quantized"
PLAN_FILE = "plan.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1


def save(model: Any, tokenizer: Any, plan: QuantPlan, folder: Path) -> None:
    """Write a frozen model (see `qatrun.quant.freeze`) as a quantized folder."""
    folder.mkdir(parents=True, exist_ok=True)
    frozen = quantized_linears(model)
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in frozen and leaf == "q_weight":
            tensors[f"{owner}.codes"] = encode(tensor, frozen[owner].weight_format)
        elif owner in frozen and leaf == "input_inv_scale":
            continue  # follows from input_scale
        elif tensor.data_ptr() not in stored or owner in frozen:  # tied weights are stored once
            tensors[name] = tensor.contiguous()
            stored.add(tensor.data_ptr())
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    description = {
        "format_version": FORMAT_VERSION,
        "compute_dtype": dtype,
        "attn_implementation": model.config._attn_implementation,
        "plan": plan.to_dict(),
    }
    save_description(model, folder)
    tokenizer.save_pretrained(folder)
    (folder / PLAN_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def find(path: Path) -> Path | None:
    """The quantized folder that `path` is or holds, or None."""
    return next((folder for folder in (path, path / FOLDER) if (folder / PLAN_FILE).is_file()), None)


def load(path: str | Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Open a quantized folder, or a run's folder that holds one: quantizers on, scales frozen.

    Returns:
        (model, tokenizer), the model in eval mode on the CPU in its compute dtype.
    Raises:
        InputError: no quantized folder there, or one that a newer qatrun wrote or that lacks tensors.
    """
    folder = find(Path(path))
    if folder is None:
        raise InputError(Problem(f"no quantized model at '{path}' (no {PLAN_FILE})"))
    description = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    if description["format_version"] > FORMAT_VERSION:
        version = description["format_version"]
        raise InputError(Problem(f"'{path}' has format version {version}; this qatrun reads up to {FORMAT_VERSION}"))
    plan = QuantPlan.from_dict(description["plan"])
    dtype: torch.dtype = getattr(torch, description["compute_dtype"])
    source = ModelConfig(
        path=str(folder),
        attn_implementation=description["attn_implementation"],
        trust_remote_code=trust_remote_code,
    )
    tensors = load_file(folder / WEIGHTS_FILE)
    if missing := [name for name in _quantized_tensor_names(plan) if name not in tensors]:
        raise InputError(Problem(f"'{path}' lacks {len(missing)} tensors, such as {missing[0]}"))
    model = _unquantized(source, tensors, plan, dtype)
    shared = {group: Latest() for group in plan.input_group.values()}
    for name in plan.linears:
        replace_linear(model, name, _quantized(name, tensors, plan, dtype, shared[plan.input_group[name]]))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), load_tokenizer(source)


def size_bytes(folder: Path) -> int:
    """Size of the weights in a model folder, quantized or plain."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _quantized_tensor_names(plan: QuantPlan) -> list[str]:
    """What the folder must hold for the quantized linears, their biases aside."""
    return [f"{name}.{leaf}" for name in plan.linears for leaf in ("codes", "weight_scale", "input_scale")]


def _unquantized(source: ModelConfig, tensors: dict[str, Tensor], plan: QuantPlan, dtype: torch.dtype) -> Any:
    """The model with grid values where quantized weights go, so that everything else is loaded as it should be."""
    quantized = set(plan.linears)
    weights: dict[str, Tensor] = {}
    skeleton = architecture(source)
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner not in quantized:
            weights[name] = tensor
        elif leaf == "codes":
            grid = decode(tensor, plan.roles["weight"].format).to(dtype)
            transposed = not isinstance(skeleton.get_submodule(owner), nn.Linear)
            weights[f"{owner}.weight"] = grid.t().contiguous() if transposed else grid
        elif leaf == "bias":
            weights[name] = tensor
    return from_tensors(skeleton, weights, dtype)


def _quantized(
    name: str, tensors: dict[str, Tensor], plan: QuantPlan, dtype: torch.dtype, shared_input: Latest
) -> QuantizedLinear:
    own = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("weight_scale", "input_scale")}
    own["q_weight"] = decode(tensors[f"{name}.codes"], plan.roles["weight"].format).to(dtype)
    own["input_inv_scale"] = inverse_scale(own["input_scale"])
    if f"{name}.bias" in tensors:
        own["bias"] = tensors[f"{name}.bias"]
    return QuantizedLinear(
        own,
        input_quantizer=Quantizer.of_role("input", plan),
        weight_format=plan.roles["weight"].format,
        shared_input=shared_input,
    )
