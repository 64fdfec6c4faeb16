"""Models from folders and the hub: looked at before they are loaded, loaded, and saved as Hugging Face folders."""

from qatrun.model.config import (
    PANGU_MODEL_TYPE,
    TRUST_KEY,
    TRUSTED,
    code_not_trusted,
    config_json,
    load_config,
    location,
    text_config,
)
from qatrun.model.export import MAX_SHARD, save_description, save_model
from qatrun.model.load import (
    DTYPES,
    architecture,
    check_model,
    from_tensors,
    load_model,
    on_device,
    without_values,
    without_weights,
)
from qatrun.model.writing import write_text

__all__ = [
    "DTYPES",
    "MAX_SHARD",
    "PANGU_MODEL_TYPE",
    "TRUSTED",
    "TRUST_KEY",
    "architecture",
    "check_model",
    "code_not_trusted",
    "config_json",
    "from_tensors",
    "load_config",
    "load_model",
    "location",
    "on_device",
    "save_description",
    "save_model",
    "text_config",
    "without_values",
    "without_weights",
    "write_text",
]
