"""Models from folders and the hub: looked at before they are loaded, loaded, and saved as Hugging Face folders."""

from qatrun.model.config import load_config, text_config
from qatrun.model.export import save_description, save_model
from qatrun.model.load import (
    DTYPES,
    architecture,
    check_model,
    from_tensors,
    load_model,
    load_tokenizer,
    on_device,
)

__all__ = [
    "DTYPES",
    "architecture",
    "check_model",
    "from_tensors",
    "load_config",
    "load_model",
    "load_tokenizer",
    "on_device",
    "save_description",
    "save_model",
    "text_config",
]
