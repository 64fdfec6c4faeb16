"""Load a model or only its architecture, and save them as a Hugging Face folder.

OpenPangu-Embedded checkpoints name a `model_type` that transformers does not know and remote code that does not load in
transformers 5. They are Llamas with a bias on q/k/v/o: their config is read as a LlamaConfig, so no remote code runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
)
from transformers.utils import cached_file

from qatrun import demo
from qatrun.errors import InputError, Problem
from qatrun.hub import ask_once
from qatrun.recipe import ModelConfig

PANGU_MODEL_TYPE = "PanguEmbedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_config(model: ModelConfig) -> Any:
    """The architecture's config; fetches config.json alone.

    Raises:
        InputError: no such folder or hub id, or an architecture that is unknown without remote code.
    """
    raw = config_json(model)
    if raw.get("model_type") == PANGU_MODEL_TYPE:
        fields = {key: value for key, value in raw.items() if key not in {"model_type", "auto_map", "architectures"}}
        bias = fields.pop("bias", True)
        return LlamaConfig(**fields, attention_bias=bias, architectures=["LlamaForCausalLM"])
    try:
        return AutoConfig.from_pretrained(
            location(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(Problem(f"{model.path}: {_first_line(error)}", key="model.path")) from error


def load_model(model: ModelConfig, dtype: torch.dtype | Literal["auto"]) -> Any:
    """The pretrained model in `dtype` ("auto": its config's) on the CPU, in eval mode.

    Raises:
        InputError: it cannot be found or read, or its checkpoint lacks weights (they would be random).
    """
    config = load_config(model)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            location(model),
            config=config,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            attn_implementation=model.attn_implementation,
            dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(Problem(f"{model.path}: {_first_line(error)}", key="model.path")) from error
    if missing := sorted(info["missing_keys"]):
        message = (
            f"{model.path}: the checkpoint lacks {len(missing)} weights, such as {missing[0]}; they would be random"
        )
        raise InputError(Problem(message, key="model.path"))
    loaded.config.use_cache = False
    _make_savable(loaded.generation_config)
    return loaded.eval()


def architecture(model: ModelConfig) -> nn.Module:
    """The model on the meta device: shapes and names, no weights, no memory."""
    config = load_config(model)
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(
                config, attn_implementation=model.attn_implementation, trust_remote_code=model.trust_remote_code
            )
    except (ValueError, ImportError) as error:
        key = "model.attn_implementation" if "attention" in str(error).lower() else "model.path"
        raise InputError(Problem(f"{model.path}: {_first_line(error)}", key=key)) from error
    assert isinstance(empty, nn.Module)
    return empty


def from_tensors(empty: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """A model of the architecture of `empty` with these weights, in eval mode.

    Raises:
        InputError: weights are missing.
    """
    model, info = type(empty).from_pretrained(
        None, config=empty.config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"the weights lack {len(missing)} tensors, such as {missing[0]}")
    model.config.use_cache = False
    return model.eval()


def on_device(model: Any) -> Any:
    """The model where it runs fastest here: the GPU if there is one."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def save_model(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder (config, safetensors, tokenizer) that plain `from_pretrained` opens in `dtype`."""
    config_dtype, use_cache = model.config.dtype, model.config.use_cache
    masters = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        # The model itself is cast meanwhile: only so does transformers see tied weights and write the right dtype.
        for parameter, master in masters:
            parameter.data = master.to(dtype)
        model.config.use_cache = True
        model.save_pretrained(folder)
    finally:
        for parameter, master in masters:
            parameter.data = master
        model.config.dtype, model.config.use_cache = config_dtype, use_cache
    tokenizer.save_pretrained(folder)


def _make_savable(generation: GenerationConfig) -> None:
    """Turn sampling on where a checkpoint sets its temperature but not `do_sample`: transformers loads that, and refuses
    to save it, which would only show after training."""
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def location(model: ModelConfig) -> str:
    """Where transformers finds it: a folder or a hub id."""
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
        raise InputError(Problem(_not_found(model.path), key="model.path")) from error
    if path is None:
        raise InputError(Problem(_not_found(model.path), key="model.path"))
    try:
        raw: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(Problem(f"{path} is no JSON: {error}", key="model.path")) from error
    return raw


def _not_found(path: str) -> str:
    if Path(path).is_dir():
        return f"folder '{path}' holds no config.json"
    offline = " (offline: HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""
    return f"no model folder '{path}' here, and the hub did not give one{offline}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
