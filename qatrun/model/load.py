"""Load a model or only its architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM

from qatrun.errors import InputError, Problem
from qatrun.model.causality import check_causal, sees_the_future
from qatrun.model.config import blame, config_json, load_config, location, refuse, sentence, text_config
from qatrun.model.export import check_export, make_savable
from qatrun.model.weights import check_weights, misfits, quantized_by, read_headers
from qatrun.recipe import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL = 20_000_000  # parameters; so many are made up in no time, to see the architecture run
MOST_PARAMETERS = 200_000  # tensors; building more of them would not end


def check_model(model: ModelConfig, empty: nn.Module) -> None:
    """All that can be known of a model without loading weights.

    Args:
        empty: its architecture on the meta device.
    Raises:
        InputError: weight files that are not what they should be or do not fit config.json, an encoder, or settings that
            could not be saved after training.
    """
    problems: list[Problem] = []
    for check in (check_causal, check_weights, check_export):
        try:
            check(model, empty)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if sum(parameter.numel() for parameter in empty.parameters()) <= SMALL:
        with torch.random.fork_rng(devices=[]):
            _check_runs(model, _build(model, load_config(model), "cpu").eval())


def load_model(model: ModelConfig, dtype: torch.dtype | Literal["auto"]) -> Any:
    """The pretrained model in `dtype` ("auto": its config's) on the CPU, in eval mode.

    Raises:
        InputError: it cannot be found or read, its checkpoint lacks weights (they would be random), holds some that the
            architecture has no place for or that are NaN, or it is no causal model.
    """
    config = load_config(model)
    stored = read_headers(model)
    try:
        with _bounded():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                location(model),
                config=config,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                attn_implementation=model.attn_implementation,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the info, and refused in plainer words
            )
    except Exception as error:  # transformers raises whatever files and values lead to
        raise InputError(_cannot_build(model, error)) from error
    refuse(model, quantized_by(model, stored, loaded) or misfits(info, loaded))
    if bad := next((name for name, p in loaded.named_parameters() if not torch.isfinite(p).all()), None):
        refuse(model, [f"{bad} holds NaN or infinite values in the checkpoint"])
    text_config(loaded).use_cache = loaded.config.use_cache = False
    loaded.eval()
    check_causal(model, loaded)
    _check_runs(model, loaded)
    make_savable(loaded.generation_config)
    return loaded


def architecture(model: ModelConfig) -> nn.Module:
    """The model on the meta device: shapes and names, no weights, no memory.

    Raises:
        InputError: no such model, or a config.json that no model can be built by.
    """
    config = load_config(model)
    try:
        return _build(model, config)
    except Exception as error:  # a config's values reach any line of a model's code
        raise InputError(_cannot_build(model, error)) from error


def without_values(model: ModelConfig) -> Any:
    """The architecture in float32 on the CPU, with weights that are made up: to see what computing it costs.

    Raises:
        InputError: as `architecture`.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            return _build(model, load_config(model), "cpu").float()
    except Exception as error:  # a config's values reach any line of a model's code
        raise InputError(_cannot_build(model, error)) from error


def without_weights(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """What `load_model` gives, on the meta device.

    Raises:
        InputError: as `architecture`.
    """
    empty = architecture(model)
    for parameter in empty.parameters():
        parameter.data = parameter.data.to(dtype)
    config: Any = empty.config
    text_config(empty).use_cache = config.use_cache = False
    return empty.eval()


def _check_runs(model: ModelConfig, built: Any) -> None:
    """Raises InputError where it does not run on text, or where a token's logits depend on those after it."""
    try:
        looks_ahead = sees_the_future(built)
    except Exception as error:  # the code of any model
        raise InputError(
            Problem(f"{model.path}: it does not run on text alone: {sentence(error)}", "model.path")
        ) from error
    if looks_ahead:
        refuse(model, ["what it says of a token changes with the tokens after it: it is no causal language model"])


def _build(model: ModelConfig, config: Any, device: str = "meta") -> nn.Module:
    options = {"attn_implementation": model.attn_implementation, "trust_remote_code": model.trust_remote_code}
    with torch.device(device), _bounded():
        built: nn.Module = AutoModelForCausalLM.from_config(config, **options)
    return built


def _cannot_build(model: ModelConfig, error: Exception) -> Problem:
    """Why a model could not be built or loaded, with the entry of config.json that is at fault, where it is one."""
    said = sentence(error)
    if "attention" in said.lower() and isinstance(error, ValueError | ImportError):
        hint = "; try eager" if model.attn_implementation != "eager" else ""
        return Problem(f"{model.path}: {said.split('. ')[0]}{hint}", key="model.attn_implementation")
    if said.startswith("Unrecognized configuration class"):
        said = f"transformers knows no causal language model of the type '{config_json(model)['model_type']}'"
    elif not isinstance(error, OSError | InputError) and (
        blamed := blame(config_json(model), lambda c: _build(model, c))
    ):
        said = f"{blamed}, and no model can be built so ({said})"
    return Problem(f"{model.path}: {said}", key="model.path")


@contextmanager
def _bounded() -> Iterator[None]:
    """Give up building where config.json asks for more parameters than any model has: layers by the million."""
    count = 0

    def registered(_module: nn.Module, _name: str, _parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > MOST_PARAMETERS:
            raise InputError(f"config.json asks for more than {MOST_PARAMETERS:,} weight tensors, which no model has")

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def from_tensors(empty: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """A model of the architecture of `empty` with these weights, in eval mode.

    Raises:
        InputError: weights are missing.
    """
    # Some architectures go on to zero the pad token's row of what was loaded, in the very tensor that they were given.
    owners = {name for name, module in empty.named_modules() if isinstance(module, nn.Embedding)}
    embeddings = {name: tensor.clone() for name, tensor in tensors.items() if name.rpartition(".")[0] in owners}
    model, info = type(empty).from_pretrained(
        None, config=empty.config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"the weights lack {len(missing)} tensors, such as {missing[0]}")
    model.load_state_dict(embeddings, strict=False)
    text_config(model).use_cache = model.config.use_cache = False
    return model.eval()


def on_device(model: Any) -> Any:
    """The model where it runs fastest here: the GPU if there is one."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
