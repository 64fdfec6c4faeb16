"""Names of what an arm is exported as, of engines that open it, of forms of a table: what recipes and options name."""

from __future__ import annotations

from collections.abc import Collection

from qatrun.errors import InputError
from qatrun.text import suggestion

EXPORT_NAMES = ("compressed-tensors", "onnx", "hif8", "hif8-ascend", "ascend-v1")
TABLE_FORMATS = ("text", "json", "csv", "latex", "markdown")
ENGINE_NAMES = ("transformers", "onnxruntime", "vllm")


def known(name: str, names: Collection[str], option: str) -> str:
    """The name, where it is one of these.

    Raises:
        InputError: it is none; names the option, and the nearest.
    """
    if name in ("gguf", "llama.cpp", "llamacpp"):
        raise InputError(
            f"{option} {name}: llama.cpp has none of these grids; its convert_hf_to_gguf.py --outtype q8_0 takes the arm's "
            f"plain folder and quantizes that anew (here: {', '.join(names)})"
        )
    if name not in names:
        raise InputError(f"{option} {name}: no such name{suggestion(name, names)}")
    return name
