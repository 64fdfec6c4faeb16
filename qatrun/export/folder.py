"""What exported folders have in common: the parts of a model that are not quantized, its weights in shards, its description,
and what is read back from them to be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from qatrun.export.weights import WEIGHTS, write_weights
from qatrun.model import save_description
from qatrun.quant import QuantizedLinear, quantized_linears


class Stored(NamedTuple):
    """A quantized linear as it lies in a folder.

    Attributes:
        codes: [out, in] uint8 or int8, the bits.
        weight_scale: [out] float32; equal entries where the tensor has one.
        input_scale: [] float32; None where the engine finds scales itself.
        input_zero_point: [] int8; None where inputs are symmetric.
    """

    codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None = None

    @classmethod
    def of(cls, linear: QuantizedLinear) -> Stored:
        """The linear that was scored."""
        codes = linear.weight_grid.encode(linear.q_weight.float())
        input_scale = None if linear.input_scheme.per_row else linear.input_scale
        return cls(codes, linear.weight_scale.flatten().expand(len(codes)), input_scale, linear.input_zero_point)

    @property
    def zero(self) -> int:
        """The code of an input's zero."""
        return 0 if self.input_zero_point is None else int(self.input_zero_point)

    @property
    def is_exact(self) -> bool:
        """Whether products with its scales are exact: powers of two, and none left to the engine. Under a zero-point engines
        round halves otherwise: x / s + z to even."""
        scales = (self.weight_scale, self.input_scale)
        exact = all(scale is not None and bool((scale.frexp().mantissa == 0.5).all()) for scale in scales)
        return exact and self.input_zero_point is None


def stored_linears(model: Any) -> dict[str, Stored]:
    """Those of a frozen model by name."""
    return {name: Stored.of(linear) for name, linear in quantized_linears(model).items()}


def other_tensors(model: Any) -> dict[str, Tensor]:
    """Everything of a frozen model but its quantized linears; tied weights once."""
    frozen = quantized_linears(model)
    kept: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in frozen and tensor.data_ptr() not in stored:
            kept[name] = tensor
            stored.add(tensor.data_ptr())
    return kept


def write_model(
    model: Any,
    tokenizer: Any,
    tensors: Mapping[str, Tensor],
    folder: Path,
    entries: Mapping[str, Any],
    *,
    pattern: str = WEIGHTS,
) -> None:
    """Fill a folder that transformers opens: weights in shards of at most 5 GB, config.json with these entries more, the
    tokenizer."""
    write_weights(tensors, folder, pattern)
    write_description(model, tokenizer, folder, entries)


def write_description(model: Any, tokenizer: Any, folder: Path, entries: Mapping[str, Any]) -> None:
    """The same without weights."""
    save_description(model, folder)
    tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | dict(entries)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
