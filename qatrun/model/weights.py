"""Weight files, looked at without being loaded: whole, made for this architecture, and in full precision.

The headers of safetensors files give names and shapes; transformers itself then says, on the meta device, which of them
the architecture has a place for, whatever it renames and merges on the way. A pickled file is read by torch's
weights-only reader, which runs nothing.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import logging

from qatrun.model.config import location, quantized_already, refuse, sentence
from qatrun.model.files import what_it_is
from qatrun.recipe import ModelConfig

# In the order in which transformers looks for them.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
QUANTIZED_DTYPES = re.compile(r"F8.*|F4.*|F6.*|I8|U8|int8|uint8|float8.*|float4.*")
QUANTIZED_LEAVES = {
    "qweight": "GPTQ or AWQ",
    "SCB": "bitsandbytes",
    "absmax": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8 or compressed-tensors",
    "codes": "qatrun",
}
TOOL_FILES = {"hf_quant_config.json": "ModelOpt", "quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}


def check_weights(model: ModelConfig, empty: nn.Module) -> None:
    """Compare a folder's weight files with the architecture; says nothing of a model that is still on the hub.

    Args:
        empty: the architecture on the meta device.
    Raises:
        InputError: files that are missing, damaged or something else; weights that are quantized already, that are
            missing, of another shape, or that the architecture has no place for.
    """
    stored = read_headers(model)
    if stored:
        refuse(model, quantized_by(model, stored, empty) or misfits(_fit(empty, stored), empty))


def read_headers(model: ModelConfig) -> dict[str, tuple[Tensor, str]]:
    """Name -> (tensor on the meta device, name of its dtype) of the weights in a folder; of a hub id, nothing.

    Raises:
        InputError: files that are missing, damaged or something else.
    """
    folder, stored, problems = Path(location(model)), dict[str, tuple[Tensor, str]](), list[str]()
    if not folder.is_dir():
        return stored
    try:
        files = _files(folder)
    except (ValueError, OSError) as error:
        files, problems = [], [sentence(error)]
    for file in files:
        wrong = what_it_is(file) if file.is_file() else "is missing, which the index names"
        if wrong is None:
            try:
                stored |= _tensors(file)
            except Exception as error:  # what a damaged file makes of its readers
                wrong = _unreadable(file, error)
        if wrong is not None:
            problems.append(f"{file.name} {wrong}")
    refuse(model, problems)
    return stored


def misfits(info: Mapping[str, Any], model: nn.Module) -> list[str]:
    """What transformers' loading info says of weights that do not fit; a sentence for each kind."""
    problems = []
    if wrong := sorted(info["mismatched_keys"]):
        name, stored, wanted = wrong[0]
        more = f", and {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""
        problems.append(f"{name} is {_shape(stored)} in the checkpoint, {_shape(wanted)} by config.json{more}")
    if missing := sorted(info["missing_keys"]):
        problems.append(f"the checkpoint lacks {len(missing)} weights, such as {missing[0]}; they would be random")
    if left_over := _parts_without_a_place(info["unexpected_keys"], model):
        problems.append(
            f"the checkpoint holds {len(left_over)} weights that the architecture by config.json has no place for, such "
            f"as {left_over[0]}"
        )
    return problems


def _parts_without_a_place(unexpected: Iterable[str], model: nn.Module) -> list[str]:
    """Those that would have been part of this very network: of one layer more, or the bias of one of its modules. Heads,
    towers and buffers of other tools are none of ours."""
    known = {_numberless(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    owners = {name.rpartition(".")[0] for name in known}

    def is_part(name: str) -> bool:
        owner, _, leaf = _numberless(name).rpartition(".")
        return _numberless(name) in known or (leaf in ("weight", "bias") and owner in owners)

    return sorted(filter(is_part, unexpected))


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a number"


def _files(folder: Path) -> list[Path]:
    """The weight files that transformers would read.

    Raises:
        ValueError: there are none, or an index that is no index.
    """
    name = next((name for name in FILES if (folder / name).is_file()), None)
    if name is None:
        others = sorted(path.name for pattern in ("*.gguf", "*.pth", "*.pt", "*.h5") for path in folder.glob(pattern))
        there = f" (only {', '.join(others[:3])}, which is not read)" if others else ""
        raise ValueError(f"no weights: neither model.safetensors nor pytorch_model.bin is there{there}")
    if not name.endswith(".json"):
        return [folder / name]
    try:
        shards = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
        if not shards or not all(Path(shard).name == shard for shard in shards):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        what = what_it_is(folder / name) or "is no index of weight files"
        raise ValueError(f"{name} {what}") from None
    return [folder / shard for shard in sorted(shards)]


def _unreadable(file: Path, error: Exception) -> str:
    """Why a weight file cannot be read, in the words that follow its name."""
    if isinstance(error, SafetensorError):
        return _truncated(file) or f"is no whole safetensors file ({sentence(error)})"
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named.group(1)})" if named else ""
        return (
            f"holds Python objects beside weights{what}, and to read those is to run code: nothing of it was run; have the "
            "weights saved as safetensors"
        )
    return f"cannot be read as weights: it is damaged, truncated or something else ({sentence(error)})"


def _truncated(file: Path) -> str | None:
    """Of a safetensors file whose header can be read: how much of it is there."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 + length:
            return f"is truncated, or no safetensors file ({size:,} bytes)"
        try:
            header = json.loads(opened.read(length))
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return None
    expected = 8 + length + end
    return f"is truncated: {size:,} of {expected:,} bytes" if size < expected else None


def _tensors(file: Path) -> dict[str, tuple[Tensor, str]]:
    """Name -> (tensor on the meta device, name of its dtype)."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: (torch.empty(part.get_shape(), device="meta"), str(part.get_dtype()))
                for name, part in slices.items()
            }
    zipped = zipfile.is_zipfile(file)
    loaded = torch.load(file, map_location="meta", weights_only=True, mmap=zipped or None)
    if not isinstance(loaded, dict):
        raise ValueError("no mapping of names to tensors")
    if odd := [name for name, value in loaded.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"'{odd[0]}' is no tensor")
    return {
        name: (torch.empty(tensor.shape, device="meta"), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in loaded.items()
    }


def quantized_by(model: ModelConfig, stored: Mapping[str, tuple[Tensor, str]], built: nn.Module) -> list[str]:
    """The first sign that another tool, or qatrun, quantized the weights though config.json does not say so; or none."""
    folder = Path(location(model))
    for name, tool in TOOL_FILES.items():
        if (folder / name).is_file():
            return [quantized_already(tool, name)]
    own = built.state_dict().keys()
    for name, (_, dtype) in stored.items():
        leaf = name.rpartition(".")[2]
        if name not in own and leaf in QUANTIZED_LEAVES:
            return [quantized_already(QUANTIZED_LEAVES[leaf], f"its {name}")]
        if leaf == "weight" and QUANTIZED_DTYPES.fullmatch(dtype):
            return [quantized_already(dtype, f"the dtype of {name}")]
    return []


def _fit(empty: Any, stored: Mapping[str, tuple[Tensor, str]]) -> Mapping[str, Any]:
    """Transformers' loading info for tensors on the meta device; an empty one where it cannot load there."""
    options = {"device_map": {"": "meta"}, "output_loading_info": True, "ignore_mismatched_sizes": True}
    tensors = {name: tensor for name, (tensor, _) in stored.items()}
    with _silent_transformers():
        try:
            config = copy.deepcopy(empty.config)
            info: Mapping[str, Any] = type(empty).from_pretrained(None, config=config, state_dict=tensors, **options)[1]
        except Exception:  # a conversion that asks for values: what does not fit shows when it is loaded
            return dict.fromkeys(("mismatched_keys", "missing_keys", "unexpected_keys"), ())
    return info


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """No progress bars and no load report, which would tell of a look as of a load."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
