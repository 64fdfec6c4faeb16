"""The quantized model as a folder: 8-bit codes and scales in safetensors, with the plan.

    quantized/
      model.safetensors    codes of quantized weights (uint8; int8 for INT8), scales, zero-points; else the compute dtype;
                           above 5 GB in parts, model-00001-of-0000N.safetensors, with an index
      plan.json            which linears and by which schemes, the compute dtype, the attention kernel
      config.json, tokenizer files, generation_config.json

Reading it back gives the very model that was written: grid values are exact in the compute dtype and codes are exact
grid values, so nothing is rounded twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from qatrun.errors import DamagedFileError, InputError, Problem
from qatrun.export.weights import StoredTensors, weights_files, write_weights
from qatrun.files import filled_folder, flush_to_disk, read_json, reading, write_json
from qatrun.layout import PLAN_FILE, QUANTIZED, WEIGHTS_FILES
from qatrun.model import DTYPES, architecture, from_tensors, save_description
from qatrun.numerics import GRIDS, Grid, inverse_scale
from qatrun.quant import (
    Experts,
    Latest,
    QTensor,
    QuantizedLinear,
    QuantPlan,
    experts_of_linears,
    quantized_linears,
    replace_linears,
)
from qatrun.recipe import ModelConfig
from qatrun.records.quantized import Quantized, Versioned
from qatrun.scheme import GRANULARITIES
from qatrun.tokenizer import load_tokenizer

FOLDER = QUANTIZED
FORMAT_VERSION = 2
SHOWN = 5  # wrong tensors that are named one by one
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it a reciprocal may overflow


def save(model: Any, tokenizer: Any, plan: QuantPlan, folder: Path) -> None:
    """Write a frozen model (see `qatrun.quant.freeze`) as a quantized folder."""
    frozen = quantized_linears(model)
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in frozen and leaf == "q_weight":
            tensors[f"{owner}.codes"] = frozen[owner].weight_grid.encode(tensor.float())
        elif tensor.data_ptr() not in stored or owner in frozen:  # tied weights are stored once
            tensors[name] = tensor.contiguous()
            stored.add(tensor.data_ptr())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    (folder / PLAN_FILE).unlink(missing_ok=True)  # it comes last: until then the folder is none
    with filled_folder(folder):
        write_weights(tensors, folder)
        for file in weights_files(folder):
            flush_to_disk(file)
        save_description(model, folder)
        tokenizer.save_pretrained(folder)
    description = {
        "format_version": FORMAT_VERSION,
        "compute_dtype": dtype,
        "attn_implementation": model.config._attn_implementation,
        "plan": plan.to_dict(),
    }
    write_json(folder / PLAN_FILE, description)


def find(path: Path) -> Path | None:
    """The quantized folder that `path` is or holds, or None."""
    return next((folder for folder in (path, path / FOLDER) if (folder / PLAN_FILE).is_file()), None)


def load(path: str | Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Open a quantized folder, or a run's folder that holds one: quantizers on, scales frozen.

    Returns:
        (model, tokenizer), the model in eval mode on the CPU in its compute dtype.
    Raises:
        InputError: no quantized folder there, one that a newer qatrun wrote, or a file in it that is not what it should be.
    """
    folder = find(Path(path))
    if folder is None:
        raise InputError(Problem(f"no quantized model at '{path}' (no {PLAN_FILE})"))
    description = _description(folder)
    plan, dtype = read_plan(folder), DTYPES[description["compute_dtype"]]
    source = ModelConfig(
        path=str(folder),
        attn_implementation=description["attn_implementation"],
        trust_remote_code=trust_remote_code,
    )
    skeleton, tokenizer = architecture(source), load_tokenizer(source)  # before gigabytes are read
    tensors = StoredTensors(folder)
    if problems := list(_problems(tensors, plan, skeleton, dtype)):
        more = f" (and {len(problems) - 1} more such)" if len(problems) > SHOWN else ""
        shown = problems[:1] if more else problems
        raise DamagedFileError([Problem(f"{tensors.place}: {problem}{more}") for problem in shown])
    try:
        model = _unquantized(skeleton, tensors, plan, dtype)
    except InputError as error:
        raise DamagedFileError(f"{tensors.place}: {error}") from error
    shared = {slot: Latest() for slot in plan.slots()}
    frozen = {name: _quantized(name, tensors, plan, dtype, shared[plan.slot(name, "input")]) for name in plan.linears}
    replace_linears(model, frozen)
    with reading(folder / "generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), tokenizer


def read_plan(folder: Path) -> QuantPlan:
    """The plan of a quantized folder.

    Raises:
        InputError: plan.json is missing, torn, of a newer version or something else.
    """
    description = _description(folder)
    with reading(folder / PLAN_FILE):
        described = description["plan"]
        return QuantPlan.from_dict(_of_version_1(described) if description["format_version"] == 1 else described)


def size_bytes(folder: Path) -> int:
    """Size of the weights in a model folder, quantized or plain."""
    return sum(file.stat().st_size for file in folder.glob(WEIGHTS_FILES))


def _description(folder: Path) -> Quantized:
    version = read_json(folder / PLAN_FILE, Versioned)["format_version"]
    if version > FORMAT_VERSION:
        message = f"'{folder}' has format version {version}; this qatrun reads up to {FORMAT_VERSION}"
        raise InputError(Problem(message))
    return read_json(folder / PLAN_FILE, Quantized)


def _problems(tensors: Mapping[str, Tensor], plan: QuantPlan, skeleton: nn.Module, dtype: torch.dtype) -> Iterator[str]:
    """A sentence on every tensor that is not what plan and architecture ask for: kernels would read past it, or take its
    bytes for another number."""
    expected, experts = skeleton.state_dict(), experts_of_linears(skeleton)
    planned = set(plan.linears)
    for name in plan.linears:
        shape = _effective_shape(name, expected, skeleton, experts)
        if shape is None:
            yield f"the plan names {name}, which is no linear of this model"
            continue
        if name in experts and not planned.issuperset(experts[name].linears):
            yield f"the plan names {name}, but not all experts of that parameter"
        scheme = plan.schemes[name]["weight"]
        yield from _codes_problems(f"{name}.codes", tensors, shape, GRIDS[scheme.format])
        yield from _scale_problems(
            f"{name}.weight_scale", tensors, GRANULARITIES[scheme.granularity].scale_shape(shape)
        )
        yield from _scale_problems(f"{name}.input_scale", tensors, ())
        if not plan.schemes[name]["input"].symmetric:
            yield from _zero_point_problems(f"{name}.input_zero_point", tensors)
    leaves = {f"{name}.{leaf}" for name in plan.linears for leaf in ("codes", "weight_scale", "input_scale")}
    leaves |= {f"{name}.input_zero_point" for name in plan.linears if not plan.schemes[name]["input"].symmetric}
    replaced = {f"{experts[n].owner}.{experts[n].leaf}" if n in experts else f"{n}.weight" for n in plan.linears}
    for name in tensors.keys() - leaves:
        stored, asked = tensors[name], expected.get(name)
        if asked is None or name in replaced:
            yield f"{name} is no tensor of this model"
        elif stored.shape != asked.shape or (asked.is_floating_point() and stored.dtype != dtype):
            yield f"{name} must be {_shown(dtype, asked.shape)} ({_got(stored)})"
        elif stored.is_floating_point() and not stored.isfinite().all():
            yield f"{name} is not finite"


def _effective_shape(
    name: str, expected: Mapping[str, Tensor], skeleton: nn.Module, experts: Mapping[str, Experts]
) -> tuple[int, ...] | None:
    """[out, in] of the weight of a linear; None where there is no such linear."""
    if name in experts:
        return experts[name].shape
    weight = expected.get(f"{name}.weight")
    if weight is None or weight.dim() != 2:
        return None
    transposed = not isinstance(skeleton.get_submodule(name), nn.Linear)
    return (*reversed(weight.shape),) if transposed else (*weight.shape,)


def _codes_problems(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...], grid: Grid) -> Iterator[str]:
    codes, dtype = tensors.get(name), grid.code_dtype
    if codes is None or codes.dtype != dtype or codes.shape != shape:
        yield f"{name} must be {_shown(dtype, shape)}, codes of {grid.format.name} ({_got(codes)})"
    elif not grid.decode(codes).isfinite().all():
        yield f"{name} holds codes of {grid.format.name} that are NaN or Inf"


def _scale_problems(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Iterator[str]:
    scale = tensors.get(name)
    right = scale is not None and scale.dtype == torch.float32 and scale.shape == shape
    if scale is None or not right or not ((scale >= SMALLEST_SCALE) & scale.isfinite()).all():
        yield f"{name} must be {_shown(torch.float32, shape)}, positive and finite ({_got(scale)})"


def _zero_point_problems(name: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    zero = tensors.get(name)
    if zero is None or zero.dtype != torch.int8 or zero.dim():
        yield f"{name} must be {_shown(torch.int8, ())} ({_got(zero)})"


def _shown(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} of shape {list(shape)}"


def _got(tensor: Tensor | None) -> str:
    if tensor is None:
        return "it is missing"
    known = tensor.numel() and not tensor.is_complex()
    values = f", {tensor.double().min().item():g} .. {tensor.double().max().item():g}" if known else ""
    return f"got {_shown(tensor.dtype, tensor.shape)}{values}"


def _unquantized(skeleton: Any, tensors: Mapping[str, Tensor], plan: QuantPlan, dtype: torch.dtype) -> Any:
    """The model with grid values where quantized weights go, so that everything else is loaded as it should be."""
    weights: dict[str, Tensor] = {}
    experts = experts_of_linears(skeleton)
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner not in plan.schemes or leaf == "bias":
            weights[name] = tensor
        elif leaf == "codes" and owner not in experts:
            values = _grid_of(plan, owner).decode(tensor).to(dtype)
            transposed = not isinstance(skeleton.get_submodule(owner), nn.Linear)
            weights[f"{owner}.weight"] = values.t().contiguous() if transposed else values
    for parameter in dict.fromkeys(experts[name] for name in plan.linears if name in experts):
        values = torch.stack(
            [_grid_of(plan, each).decode(tensors[f"{each}.codes"]).to(dtype) for each in parameter.linears]
        )
        held = values.transpose(1, 2).contiguous() if parameter.transposed else values
        weights[f"{parameter.owner}.{parameter.leaf}"] = held
    return from_tensors(skeleton, weights, dtype)


def _quantized(
    name: str, tensors: Mapping[str, Tensor], plan: QuantPlan, dtype: torch.dtype, shared_input: Latest
) -> QuantizedLinear:
    grid, bias = _grid_of(plan, name), tensors.get(f"{name}.bias")
    values = grid.decode(tensors[f"{name}.codes"]).to(dtype)
    weight = QTensor(grid, values, None, tensors[f"{name}.weight_scale"])
    scale = tensors[f"{name}.input_scale"]
    fit = scale, inverse_scale(scale), tensors.get(f"{name}.input_zero_point")
    return QuantizedLinear(weight, bias, plan.schemes[name]["input"], fit, shared_input)


def _grid_of(plan: QuantPlan, linear: str) -> Grid:
    """That a linear's weight is on."""
    return GRIDS[plan.schemes[linear]["weight"].format]


def _of_version_1(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan that has the same schemes for all linears, as this version writes it.

    Raises:
        KeyError: it is none.
    """
    shared = {"clip": plan["clip"], "ste": plan["ste"]}
    schemes = [{key: value for key, value in spec.items() if key != "role"} | shared for spec in plan["roles"].values()]
    numbers = {role: number for number, role in enumerate(plan["roles"])}
    return {
        "schemes": schemes,
        "linears": dict.fromkeys(plan["linears"], numbers),
        "input_group": plan["input_group"],
        "saves_codes": plan["saved_activations"] == "codes",
    }
