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

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from qatrun.errors import DamagedFileError, InputError, Problem
from qatrun.export.artifact_check import problems
from qatrun.export.folder import write_description
from qatrun.export.weights import StoredTensors, weights_files, write_weights
from qatrun.files import filled_folder, flush_to_disk, read_json, reading, write_json
from qatrun.layout import PLAN_FILE, QUANT_METHOD, QUANTIZED, WEIGHTS_FILES
from qatrun.model import DTYPES, architecture, from_tensors
from qatrun.numerics import GRIDS, Grid, inverse_scale
from qatrun.quant import (
    Latest,
    QTensor,
    QuantizedLinear,
    QuantPlan,
    experts_of_linears,
    mark_quantized,
    quantized_linears,
    replace_linears,
)
from qatrun.recipe import ModelConfig
from qatrun.records.quantized import Quantized, Versioned
from qatrun.tokenizer import load_tokenizer

FOLDER = QUANTIZED
FORMAT_VERSION = 2
SHOWN = 5  # wrong tensors that are named one by one


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
    description = {
        "format_version": FORMAT_VERSION,
        "compute_dtype": dtype,
        "attn_implementation": model.config._attn_implementation,
        "plan": plan.to_dict(),
    }
    entries = {
        "quantization_config": {"quant_method": QUANT_METHOD, **description},
        "transformers_weights": "import qatrun (pip install qatrun) before from_pretrained, or call qatrun.load",
    }
    with filled_folder(folder):
        write_weights(tensors, folder)
        for file in weights_files(folder):
            flush_to_disk(file)
        write_description(model, tokenizer, folder, entries)
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
    check_tensors(tensors, plan, skeleton, dtype)
    try:
        model = _unquantized(skeleton, tensors, plan, dtype)
    except InputError as error:
        raise DamagedFileError(f"{tensors.place}: {error}") from error
    put_in(model, tensors, plan, dtype)
    with reading(folder / "generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), tokenizer


def read_plan(folder: Path) -> QuantPlan:
    """The plan of a quantized folder.

    Raises:
        InputError: plan.json is missing, torn, of a newer version or something else.
    """
    return described_plan(_description(folder), folder / PLAN_FILE)


def described_plan(description: Mapping[str, Any], file: Path) -> QuantPlan:
    """The plan that a file describes.

    Raises:
        InputError: it is of a newer version, or no plan.
    """
    _check_version(description["format_version"], file)
    with reading(file):
        described = description["plan"]
        return QuantPlan.from_dict(_of_version_1(described) if description["format_version"] == 1 else described)


def check_tensors(tensors: StoredTensors, plan: QuantPlan, skeleton: nn.Module, dtype: torch.dtype) -> None:
    """
    Args:
        skeleton: the architecture with its linears as they were, on the meta device.
    Raises:
        DamagedFileError: names those that are not what plan and architecture ask for.
    """
    if found := list(problems(tensors, plan, skeleton, dtype)):
        more = f" (and {len(found) - 1} more such)" if len(found) > SHOWN else ""
        shown = found[:1] if more else found
        raise DamagedFileError([Problem(f"{tensors.place}: {problem}{more}") for problem in shown])


def take_out(model: Any, linear: str) -> None:
    """Leave a place without weights, until `put_in`."""
    parent, _, child = linear.rpartition(".")
    place = nn.Module()
    for name in (
        "weight",
        "bias",
    ):  # models' own initialization reads them; registered, they would be looked for in the file
        empty = torch.empty(0)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(place, name, empty)
    setattr(model.get_submodule(parent), child, place)
    model.all_tied_weights_keys.pop(f"{linear}.weight", None)


def put_in(model: Any, tensors: Mapping[str, Tensor], plan: QuantPlan, dtype: torch.dtype) -> None:
    """Put the quantized linears of a folder into their places, on the device of the rest."""
    device, shared = next(model.parameters()).device, {slot: Latest() for slot in plan.slots()}
    frozen = {name: _quantized(name, tensors, plan, dtype, shared[plan.slot(name, "input")]) for name in plan.linears}
    replace_linears(model, {name: linear.to(device) for name, linear in frozen.items()})
    mark_quantized(model)


def size_bytes(folder: Path) -> int:
    """Size of the weights in a model folder, quantized or plain."""
    return sum(file.stat().st_size for file in folder.glob(WEIGHTS_FILES))


def _description(folder: Path) -> Quantized:
    _check_version(read_json(folder / PLAN_FILE, Versioned)["format_version"], folder)
    return read_json(folder / PLAN_FILE, Quantized)


def _check_version(version: int, path: Path) -> None:
    if version > FORMAT_VERSION:
        raise InputError(f"'{path}' has format version {version}; this qatrun reads up to {FORMAT_VERSION}")


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
