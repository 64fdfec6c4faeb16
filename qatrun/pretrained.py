"""How `transformers` opens a quantized folder: `from_pretrained` gives the very model that `qatrun.load` gives.

    import qatrun
    model = transformers.AutoModelForCausalLM.from_pretrained("runs/demo/hif8/quantized")

config.json names the quantization method `qatrun`. Importing qatrun makes it known to transformers; where nobody did, that
library would skip an unknown method and make up the weights, so config.json also names a file of weights that is none, and
`from_pretrained` ends with a sentence that says what to import.

Nothing but transformers' base classes is imported here: this module is run while transformers itself is being imported.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qatrun.errors import DamagedFileError, InputError
from qatrun.layout import QUANT_METHOD, WEIGHTS_FILE, WEIGHTS_INDEX


class FolderConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of config.json: what plan.json says, so that a hub may give the one without the other."""

    def __init__(self, **description: Any) -> None:
        self.__dict__.update(description)
        self.quant_method = QUANT_METHOD


class FolderQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the quantized linears of a folder into the model that transformers builds and fills with the rest."""

    is_trainable = False
    is_compileable = True

    def is_serializable(self, **_options: Any) -> bool:
        """`save_pretrained` asks for it: it writes no codes.

        Raises:
            InputError: always.
        """
        raise InputError(
            "save_pretrained cannot write a quantized model: qatrun.save(model, tokenizer, plan, folder) does, or copy the "
            "folder that it was opened from"
        )

    def update_dtype(self, dtype: Any) -> Any:
        """Grid values are exact in the dtype that was scored, whatever was asked for."""
        import torch

        return getattr(torch, self.quantization_config.compute_dtype)

    def update_device_map(self, device_map: Any) -> Any:
        """
        Raises:
            InputError: more than one device.
        """
        if isinstance(device_map, str) or (isinstance(device_map, dict) and len(set(device_map.values())) > 1):
            raise InputError(f"a quantized folder opens on one device (got device_map={device_map!r}): name it")
        return device_map

    def _of_the_folder(self, config: Any) -> Any:
        in_parts = (Path(config.name_or_path) / WEIGHTS_INDEX).is_file()
        config.transformers_weights = WEIGHTS_INDEX if in_parts else WEIGHTS_FILE
        if getattr(config, "_attn_implementation_internal", None) is None:
            config._attn_implementation = self.quantization_config.attn_implementation
        return config

    # Each version of transformers calls one of these before it looks for weights.
    update_attn_implementation = update_tp_plan = update_ep_plan = _of_the_folder

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str], **_options: Any) -> Any:
        """Check every tensor, and take out the linears that transformers would look for weights for."""
        from qatrun.export import artifact
        from qatrun.export.weights import StoredTensors
        from qatrun.quant import experts_of_linears

        folder = Path(checkpoint_files[0]).parent
        self.plan = artifact.described_plan(vars(self.quantization_config), folder / "config.json")
        if not experts_of_linears(model).keys().isdisjoint(self.plan.linears):
            raise InputError(f"{folder}: its experts are quantized, which qatrun.load opens")
        self.tensors = StoredTensors(folder)
        artifact.check_tensors(self.tensors, self.plan, model, self.update_dtype(None))
        for name in self.plan.linears:
            artifact.take_out(model, name)
        tied = model.all_tied_weights_keys
        for one, other in ((name, tied.get(name, name)) for name in model.state_dict()):
            if one not in self.tensors and other not in self.tensors:  # transformers would make it up
                raise DamagedFileError(f"{self.tensors.place}: it lacks {one}")
        self.ignored = model._keys_to_ignore_on_load_unexpected
        names = "|".join(map(re.escape, self.plan.linears))
        model._keys_to_ignore_on_load_unexpected = {*(self.ignored or ()), rf"^({names})\."}
        return model

    def _process_model_after_weight_loading(self, model: Any, **_options: Any) -> Any:
        from qatrun.export import artifact

        model._keys_to_ignore_on_load_unexpected = self.ignored
        artifact.put_in(model, self.tensors, self.plan, self.update_dtype(None))
        return model


def register(quantizers: ModuleType) -> None:
    """Make the method known to transformers.

    Args:
        quantizers: transformers.quantizers.auto.
    """
    quantizers.register_quantization_config(QUANT_METHOD)(FolderConfig)
    quantizers.register_quantizer(QUANT_METHOD)(FolderQuantizer)
