"""Save a model as a Hugging Face folder, and try before training what could fail then."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from qatrun.errors import InputError, Problem
from qatrun.model.config import location, sentence
from qatrun.recipe import ModelConfig

GENERATION_FILE = "generation_config.json"
MAX_SHARD = "5GB"


def save_model(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder (config, safetensors, tokenizer) that plain `from_pretrained` opens in `dtype`."""
    config_dtype, use_cache = model.config.dtype, model.config.use_cache
    masters = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        # The model itself is cast meanwhile: only so does transformers see tied weights and write the right dtype.
        for parameter, master in masters:
            parameter.data = master.to(dtype)
        model.config.use_cache = True
        model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    finally:
        for parameter, master in masters:
            parameter.data = master
        model.config.dtype, model.config.use_cache = config_dtype, use_cache
    tokenizer.save_pretrained(folder)


def save_description(model: Any, folder: Path) -> None:
    """Write all of a model but its weights: config, generation settings, and its code where that came with it."""
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    text.use_cache = config.use_cache = True  # it is off where a model is trained or scored
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def check_export(model: ModelConfig, empty: Any) -> None:
    """Write config and generation settings to a temporary folder and read them back.

    Raises:
        InputError: they could not be saved after training.
    """
    folder = Path(location(model))
    what = "config.json"
    with TemporaryDirectory() as scratch:
        try:
            empty.config.save_pretrained(scratch)
            AutoConfig.from_pretrained(scratch, trust_remote_code=model.trust_remote_code)
            if (folder / GENERATION_FILE).is_file():
                what = GENERATION_FILE
                settings = GenerationConfig.from_pretrained(folder)
                make_savable(settings)
                settings.save_pretrained(scratch)
        except Exception as error:  # transformers raises whatever the values of a config lead to
            message = f"{model.path}: {what} could not be saved again after training: {sentence(error)}"
            raise InputError(Problem(message, key="model.path")) from error


def make_savable(generation: GenerationConfig) -> None:
    """Turn sampling on where a checkpoint sets its temperature but not `do_sample`: some versions of transformers load
    that and refuse to save it, which would only show after training. Other settings stay as they are: what is only
    questionable is saved as it was loaded."""
    if not _is_strictly_valid(generation):
        before, generation.do_sample = generation.do_sample, True
        if not _is_strictly_valid(generation):
            generation.do_sample = before


def _is_strictly_valid(generation: GenerationConfig) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True
