"""HiF8 (HiFloat8) as documented codes and scales. No schema of such a checkpoint is public, so this one describes itself.

    hif8_model.safetensors    per quantized linear N; under this name, so that no engine takes codes for numbers
      N.weight                uint8 [out, in], the codes
      N.weight_scale          float32 [1], or [out, 1] a channel each
      N.input_scale           float32 [1]; absent for token scales
    hif8.json                 what the codes mean: decode table, rounding, formula

`hif8_ascend` is the same in the layout that Huawei's inference recipes read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatrun.export.folder import Stored, other_tensors, stored_linears, write_model
from qatrun.export.linears import expert_problems
from qatrun.export.weights import StoredTensors
from qatrun.files import write_json
from qatrun.formats import FORMATS
from qatrun.numerics import GRIDS
from qatrun.quant import QuantPlan

NAME = "hif8"
ENGINES: tuple[str, ...] = ()
WEIGHTS_PATTERN = "hif8_model{suffix}.safetensors"
DESCRIPTION_FILE = "hif8.json"
FORMULA = (
    "y = (decode(weight) @ decode(encode(x * (1 / input_scale)))^T) * (input_scale * weight_scale) + bias, accumulated in "
    "float32; input_scale absent: amax of the token / 15"
)


def problems(plan: QuantPlan, model: nn.Module) -> Iterator[str]:
    """What of a plan cannot be written, and what to do instead."""
    yield from expert_problems(NAME, plan, model)
    formats = {plan.schemes[name][role].format for name in plan.linears for role in ("weight", "input")}
    for format_name in sorted(formats - {"hif8"}):
        yield f"{NAME} holds HiF8 alone, and this is {format_name} (--to compressed-tensors, or train hif8)"


def notes(plan: QuantPlan) -> Iterator[str]:
    """What engines do otherwise than what was scored, or may not do."""
    yield "no engine that reads HiF8 with scaled inputs is public; nothing was run on an Ascend NPU"


def save(model: Any, tokenizer: Any, plan: QuantPlan, folder: Path) -> None:
    """Fill the folder from a frozen model (see `qatrun.quant.freeze`)."""
    tensors = other_tensors(model)
    for name, linear in stored_linears(model).items():
        per_channel = plan.schemes[name]["weight"].per_row
        tensors |= weight_tensors(name, linear, model.get_submodule(name).bias, per_channel=per_channel)
        if linear.input_scale is not None:
            tensors[f"{name}.input_scale"] = linear.input_scale.reshape(1).clone()
    write_model(model, tokenizer, tensors, folder, {}, pattern=WEIGHTS_PATTERN)
    write_json(folder / DESCRIPTION_FILE, description(plan, FORMULA))


def read(folder: Path, pattern: str = WEIGHTS_PATTERN) -> dict[str, Stored]:
    """The quantized linears of a folder."""
    tensors = StoredTensors(folder, pattern)
    found: dict[str, Stored] = {}
    for name in (key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")):
        codes, input_scale = tensors[f"{name}.weight"], tensors.get(f"{name}.input_scale")
        scale = tensors[f"{name}.weight_scale"].flatten().expand(len(codes))
        found[name] = Stored(codes, scale, None if input_scale is None else input_scale.reshape(()))
    return found


def decoded_by(linears: Mapping[str, Stored]) -> str | None:
    """The package, of somebody else's, that reads all codes as the numbers that were scored; None where it is not installed.

    Raises:
        ValueError: it reads other numbers.
    """
    try:
        import en_dtypes
    except ImportError:
        return None
    for name, linear in linears.items():
        theirs = torch.from_numpy(linear.codes.numpy().view(en_dtypes.hifloat8).astype("float32"))
        if not torch.equal(theirs, GRIDS["hif8"].decode(linear.codes)):
            raise ValueError(f"en-dtypes reads other numbers from the codes of {name}")
    return "en-dtypes"


def weight_tensors(name: str, linear: Stored, bias: Tensor | None, *, per_channel: bool) -> dict[str, Tensor]:
    """Codes, scale and bias of a linear as they are stored."""
    scale = linear.weight_scale.unsqueeze(1) if per_channel else linear.weight_scale[:1]
    tensors = {
        f"{name}.weight": linear.codes,
        f"{name}.weight_scale": scale.clone(memory_format=torch.contiguous_format),
    }
    return tensors if bias is None else tensors | {f"{name}.bias": bias}


def description(plan: QuantPlan, formula: str) -> dict[str, Any]:
    """What the codes mean, in full; Inf and NaN as words, which JSON has no numbers for."""
    values = GRIDS["hif8"].values_of_codes().tolist()
    return {
        "format": "hifloat8",
        "source": "Ascend HiFloat8, arXiv:2409.16626",
        "rounding": "to the nearest, ties away from zero",
        "overflow": f"saturates at {FORMATS['hif8'].max_finite:g}",
        "formula": formula,
        "linears": list(plan.linears),
        "decode": [value if abs(value) < float("inf") else str(value) for value in values],
    }
