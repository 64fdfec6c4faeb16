"""compressed-tensors: the checkpoint that transformers, vLLM and SGLang open. FP8 (E4M3) and INT8, weights and inputs.

Of each quantized linear N [out, in]:

    N.weight          float8_e4m3fn or int8, the codes
    N.weight_scale    float32, [1], or [out, 1] a channel each
    N.input_scale     float32, [1]; absent where engines find a scale for every token
    N.input_zero_point  int8, [1]; where inputs are asymmetric
    N.bias            in the compute dtype

Linears of one scheme are a group of config.json's `quantization_config`; all others are named in its `ignore`. Nothing is
rounded again: the codes are those that were scored.

vLLM merges q/k/v and gate/up into one matrix each. Such a group must have one scheme, and where it has a scale a tensor and
these differ, vLLM would round FP8 weights anew, to the largest; so they are written as channels of equal scales, which say
the same and are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatrun.export.folder import Stored, other_tensors, stored_linears, write_model
from qatrun.export.linears import (
    expert_problems,
    forward_schemes,
    input_problems,
    input_schemes,
    linear_problems,
    merged_groups,
)
from qatrun.export.weights import StoredTensors
from qatrun.quant import QuantPlan

NAME = "compressed-tensors"
ENGINES: tuple[str, ...] = ("transformers", "vllm")
TYPES = {"fp8_e4m3": ("float", torch.float8_e4m3fn), "int8": ("int", torch.int8)}
LAYOUT = {"fp8_e4m3": "float-quantized", "int8": "int-quantized"}
NEAREST = {"hif8": "--to hif8 keeps it, or train fp8_e4m3", "fp8_e5m2": "train fp8_e4m3"}


def problems(plan: QuantPlan, model: nn.Module) -> Iterator[str]:
    """What of a plan cannot be written, and what to do instead.

    Args:
        model: with its linears as they were before they were quantized; on the meta device will do.
    """
    yield from expert_problems(NAME, plan, model)
    if any(scheme.block is not None for name in plan.linears for scheme in forward_schemes(plan, name)):
        yield f"scales of blocks (MXFP8) are not written as {NAME} yet; `quantized/` holds them, qatrun.load opens it"
    pairs = dict.fromkeys(tuple(scheme.format for scheme in forward_schemes(plan, name)) for name in plan.linears)
    for format_name in dict.fromkeys(name for pair in pairs for name in pair if name not in TYPES):
        yield f"{NAME} has no {format_name}, its 8-bit float is E4M3 ({NEAREST[format_name]})"
    for weight, of_input in pairs:
        if weight != of_input and {weight, of_input} <= TYPES.keys():
            yield f"no engine multiplies weights in {weight} with inputs in {of_input}: give both one format"
    for scheme in input_schemes(plan):
        yield from input_problems(scheme)
    yield from linear_problems(NAME, plan, model)


def notes(plan: QuantPlan) -> Iterator[str]:
    """What engines do otherwise than what was scored, or may not do."""
    schemes = {scheme for name in plan.linears for scheme in forward_schemes(plan, name)}
    if any(scheme.format == "fp8_e4m3" for scheme in schemes):
        yield (
            "vLLM leaves inputs in BF16, and ignores their scales, where it has no FP8 product: on CPUs and on GPUs below "
            "compute capability 8.9; not checked here"
        )
    if any(scheme.per_row and scheme.format == "int8" for scheme in input_schemes(plan)):
        yield "token scales are the engine's: amax / 127 in vLLM, as scored; amax / 127.5 in transformers"
    if any(not scheme.per_row and scheme.format == "int8" and scheme.symmetric for scheme in input_schemes(plan)):
        yield "inputs below -127.5 s are clipped at -128 s by engines and at -127 s when scored; they are counted"


def save(model: Any, tokenizer: Any, plan: QuantPlan, folder: Path) -> None:
    """Fill the folder from a frozen model (see `qatrun.quant.freeze`)."""
    linears, per_channel = stored_linears(model), _written_per_channel(plan, stored_linears(model))
    tensors = other_tensors(model)
    for name, linear in linears.items():
        scale = linear.weight_scale.unsqueeze(1) if name in per_channel else linear.weight_scale[:1]
        tensors[f"{name}.weight"] = linear.codes.view(TYPES[plan.schemes[name]["weight"].format][1])
        tensors[f"{name}.weight_scale"] = scale.clone(memory_format=torch.contiguous_format)
        if linear.input_scale is not None:
            tensors[f"{name}.input_scale"] = linear.input_scale.reshape(1)
        if linear.input_zero_point is not None:
            tensors[f"{name}.input_zero_point"] = linear.input_zero_point.reshape(1)
        if (bias := model.get_submodule(name).bias) is not None:
            tensors[f"{name}.bias"] = bias
    ignored = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    write_model(model, tokenizer, tensors, folder, {"quantization_config": _config(plan, per_channel, ignored)})


def read(folder: Path) -> dict[str, Stored]:
    """The quantized linears of a folder."""
    tensors = StoredTensors(folder)
    found: dict[str, Stored] = {}
    for name in (key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")):
        weight = tensors[f"{name}.weight"]
        codes = weight if weight.dtype == torch.int8 else weight.view(torch.uint8)
        input_scale = tensors.get(f"{name}.input_scale")
        zero = tensors.get(f"{name}.input_zero_point")
        found[name] = Stored(
            codes,
            tensors[f"{name}.weight_scale"].flatten().expand(len(codes)),
            None if input_scale is None else input_scale.reshape(()),
            None if zero is None else zero.reshape(()),
        )
    return found


def decoded_by(linears: Mapping[str, Stored]) -> str | None:
    """torch reads E4M3 itself, and integers need no reader."""
    return None


def _written_per_channel(plan: QuantPlan, linears: Mapping[str, Stored]) -> set[str]:
    """Linears whose weight scales are written as a column."""
    chosen = {name for name in linears if plan.schemes[name]["weight"].per_row}
    for group in merged_groups(linears):
        scales = torch.cat([linears[name].weight_scale for name in group])
        if chosen & set(group) or not (scales == scales[0]).all():
            chosen |= set(group)
    return chosen


def _config(plan: QuantPlan, per_channel: set[str], ignored: list[str]) -> dict[str, Any]:
    groups: dict[tuple[str, str, str, bool, bool], list[str]] = {}
    for name in plan.linears:
        weight, of_input = forward_schemes(plan, name)
        strategy = "channel" if name in per_channel else "tensor"
        groups.setdefault((weight.format, strategy, of_input.format, of_input.per_row, of_input.symmetric), []).append(
            name
        )
    formats = list(dict.fromkeys(LAYOUT[weight] for weight, *_ in groups))
    return {
        "quant_method": NAME,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": ignored,
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "format": LAYOUT[weight],
                "output_activations": None,
                "weights": _arguments(weight, strategy, dynamic=False),
                "input_activations": _arguments(
                    of_input, "token" if dynamic else "tensor", dynamic=dynamic, symmetric=symmetric
                ),
            }
            for number, ((weight, strategy, of_input, dynamic, symmetric), names) in enumerate(groups.items())
        },
    }


def _arguments(format_name: str, strategy: str, *, dynamic: bool, symmetric: bool = True) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": TYPES[format_name][0],
        "strategy": strategy,
        "symmetric": symmetric,
        "dynamic": dynamic,
    }
