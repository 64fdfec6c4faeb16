"""config.json: found, checked for what no model can be, and read.

OpenPangu-Embedded checkpoints name a `model_type` that transformers does not know and remote code that does not load in
transformers 5. They are Llamas with a bias on q/k/v/o: their config is read as a LlamaConfig, so no remote code runs.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig
from transformers.utils import cached_file

from qatrun import demo
from qatrun.errors import InputError, Problem
from qatrun.hub import ask_once
from qatrun.layout import QUANT_METHOD
from qatrun.model.files import what_it_is
from qatrun.recipe import ModelConfig

PANGU_MODEL_TYPE = "PanguEmbedded"
TRUST_KEY, TRUSTED = "model.trust_remote_code", "trust_remote_code: true"
COUNTS = re.compile(r"(.*_)?(layers?|blocks|experts|heads?)")
LARGEST_COUNT = 2**16  # nothing has more layers, experts or heads; to build them would take for ever
BLAME_SECONDS = 10
ADAPTER_FILE = "adapter_config.json"


def load_config(model: ModelConfig) -> Any:
    """The architecture's config; fetches config.json alone.

    Raises:
        InputError: no such folder or hub id, an architecture that is unknown without remote code, values that no model
            can have, or weights that another tool quantized.
    """
    raw = config_json(model)
    refuse(model, _absurdities(raw, ours=_is_ours(model, raw)))
    try:
        if raw["model_type"] == PANGU_MODEL_TYPE:
            replaced = ("model_type", "auto_map", "architectures", "bias")
            fields = {key: value for key, value in raw.items() if key not in replaced}
            return LlamaConfig(**fields, attention_bias=raw.get("bias", True), architectures=["LlamaForCausalLM"])
        config = AutoConfig.from_pretrained(
            location(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        if _is_ours(model, raw):  # who opens it puts the linears in
            del config.quantization_config, config.transformers_weights
        return config
    except Exception as error:  # transformers raises whatever the values of a config lead to
        if "auto_map" in raw and not model.trust_remote_code:
            raise InputError(code_not_trusted(model)) from error
        blamed = blame(raw, lambda _: None) if not isinstance(error, OSError) else None
        raise InputError(
            _problem(f"{model.path}: {blamed or 'config.json cannot be read'} ({sentence(error)})")
        ) from error


def refuse(model: ModelConfig, problems: Iterable[str]) -> None:
    """Raise them as the model's, if there are any."""
    if found := [_problem(f"{model.path}: {text}") for text in problems]:
        raise InputError(found)


def code_not_trusted(model: ModelConfig) -> Problem:
    """The problem of a model, or a tokenizer, that is Python code of its own where nobody trusted it."""
    return Problem(f"{model.path}: its code comes with it, and is run only with {TRUSTED}", key=TRUST_KEY)


def blame(raw: Mapping[str, Any], build: Callable[[Any], object]) -> str | None:
    """`config.json says "num_attention_heads": 0`: the one entry without which the config can be read and `build` does
    not raise; None where that is no single one, or no known architecture."""
    if raw["model_type"] not in CONFIG_MAPPING:
        return None
    kind, deadline = CONFIG_MAPPING[raw["model_type"]], time.monotonic() + BLAME_SECONDS
    for key in raw:
        if time.monotonic() > deadline:
            break
        try:
            build(kind.from_dict({name: value for name, value in raw.items() if name != key}))
        except Exception:  # still broken
            continue
        return _said(key, raw[key])
    return None


def text_config(model: Any) -> Any:
    """The config of the part of a model that reads text: that of a multimodal model lies within its own."""
    return model.config.get_text_config(decoder=True)


def location(model: ModelConfig) -> str:
    """What transformers is to open."""
    return str(demo.MODEL_DIR) if model.path == demo.BUILTIN else model.path


def config_json(model: ModelConfig) -> dict[str, Any]:
    """config.json as it stands, from a folder, the hub's cache or the hub.

    Raises:
        InputError: there is none, or it is no JSON.
    """
    if not Path(location(model)).is_dir():
        ask_once()
    try:
        path = cached_file(location(model), "config.json", revision=model.revision)
    except (OSError, ValueError) as error:
        raise InputError(_problem(_not_found(model.path))) from error
    if path is None:
        raise InputError(_problem(_not_found(model.path)))
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(_problem(f"{path} {what_it_is(Path(path)) or f'is no JSON: {sentence(error)}'}")) from error
    if not isinstance(raw, dict):
        raise InputError(_problem(f"{path} is no mapping of keys to values"))
    return raw


def sentence(error: BaseException) -> str:
    """An error of a library in one line of bearable length."""
    first, _, rest = str(error).strip().partition("\n")
    if first.rstrip().endswith(":") and rest:  # an introduction, and what it introduces
        text = " ".join(rest.split("\n\n")[0].split())
    else:
        is_told = isinstance(error, OSError | ValueError | RuntimeError | InputError)
        text = first if is_told else f"{type(error).__name__}: {first}"
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _absurdities(raw: Mapping[str, Any], *, ours: bool) -> Iterator[str]:
    """What can be told from config.json alone."""
    if not isinstance(raw.get("model_type"), str):
        yield 'config.json names no architecture ("model_type", such as "llama")'
        raw = {"model_type": ""} | dict(raw)
    for key, value in _entries(raw):
        leaf = key.rpartition(".")[2]
        if leaf in ("dtype", "torch_dtype") and value is not None and not _is_dtype(value):
            yield f'{_said(key, value)}, which is no dtype (such as "bfloat16")'
        elif leaf == "num_hidden_layers" and isinstance(value, int) and value < 1:
            yield f"{_said(key, value)}: a model without layers"
        elif COUNTS.fullmatch(leaf) and isinstance(value, int | float) and value > LARGEST_COUNT:
            yield f"{_said(key, value)}, which no model has"
    for key in ("quantization_config", "compression_config"):
        if raw.get(key) and not ours:
            yield quantized_already(_tool(raw[key]), f"config.json's {key}")


def quantized_already(tool: str, where: str) -> str:
    """The sentence for a checkpoint that another tool quantized."""
    return (
        f"its weights are quantized already ({tool}, by {where}); training starts from weights in full precision: "
        "name the checkpoint that they were made from"
    )


def _is_ours(model: ModelConfig, raw: Mapping[str, Any]) -> bool:
    """Whether it is a quantized folder that qatrun wrote: its codes tell who would train from it."""
    entry = raw.get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD and Path(location(model)).is_dir()


def _entries(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, those of nested configs too."""
    for key, value in raw.items():
        if isinstance(value, dict) and key.endswith("config"):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_dtype(value: Any) -> bool:
    if isinstance(value, dict):  # one for each part of the model
        return all(_is_dtype(part) for part in value.values())
    return value == "auto" or (isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype))


def _tool(entry: Any) -> str:
    """The name of what quantized: older files of bitsandbytes do not give it."""
    if not isinstance(entry, dict):
        return "by a tool that it does not name"
    if "quant_method" in entry:
        return str(entry["quant_method"])
    return (
        "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & entry.keys() else str(entry.get("quant_algo", "unknown"))
    )


def _said(key: str, value: Any) -> str:
    shown = json.dumps(value)
    return f'config.json says "{key}": {shown if len(shown) <= 80 else f"{shown[:80]} ..."}'


def _problem(message: str) -> Problem:
    return Problem(message, key="model.path")


def _not_found(path: str) -> str:
    folder = Path(path)
    if (folder / ADAPTER_FILE).is_file():
        return (
            f"'{path}' is an adapter (LoRA), no model: merge it first, "
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(folder)"
        )
    if folder.suffix == ".gguf" or (folder.is_dir() and any(folder.glob("*.gguf"))):
        return f"'{path}' is a GGUF file, of llama.cpp: name the Hugging Face checkpoint that it was made from"
    if folder.is_dir():
        return f"folder '{path}' holds no config.json"
    offline = " (offline: HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""
    return f"no model folder '{path}' here, and the hub did not give one{offline}"
