"""Engines that open exported folders: each gives a model that is called as one of transformers is.

An engine is another program's arithmetic on the same codes and scales. None is needed by the rest of qatrun; those that are
not installed are named with what installs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qatrun.errors import InputError, RunError
from qatrun.model import text_config
from qatrun.model.config import sentence


class Open(Protocol):
    """How an engine opens a folder."""

    def __call__(
        self, folder: Path, dtype: torch.dtype | Literal["auto"], *, attn_implementation: str, trust_remote_code: bool
    ) -> Any: ...


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        packages: that it needs, by the names they are imported by.
        install: how to get them.
        open: (folder, dtype) -> a model in eval mode, called with `input_ids`, whose result has `logits`.
    """

    packages: tuple[str, ...]
    install: str
    open: Open

    def missing(self) -> str | None:
        """Why it cannot be used here; None where it can."""
        lacking = [package for package in self.packages if find_spec(package) is None]
        return f"{', '.join(lacking)} is not installed ({self.install})" if lacking else None


def engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        InputError: it is not installed.
    """
    found = ENGINES[name]
    if (missing := found.missing()) is not None:
        raise InputError(f"engine {name}: {missing}")
    return found


def open_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder.

    Raises:
        InputError: there is none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # `tokenizers` raises no other type for a file that it does not understand
        raise InputError(f"{folder}: no tokenizer: {sentence(error)}") from error


def _open_transformers(
    folder: Path, dtype: torch.dtype | Literal["auto"], *, attn_implementation: str, trust_remote_code: bool
) -> Any:
    """The folder as `AutoModelForCausalLM.from_pretrained` gives it: weights kept compressed until the first forward, inputs
    quantized.

    Raises:
        InputError: it cannot be opened.
        RunError: keys are missing or not expected.
    """
    with _quiet_library():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises whatever files and values lead to
            raise InputError(f"{folder}: transformers cannot open it: {sentence(error)}") from error
        text_config(model).use_cache = model.config.use_cache = False
        with torch.no_grad():
            model.eval()(input_ids=torch.zeros(1, 1, dtype=torch.long))  # the first forward decompresses
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise RunError(f"{folder}: transformers reports {kind.replace('_', ' ')}, such as {min(info[kind])}")
    return model


@contextmanager
def _quiet_library() -> Iterator[None]:
    """compressed-tensors tells of its work by loguru and by progress bars, to which it has no switch."""
    from loguru import logger

    logger.disable("compressed_tensors")
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.enable("compressed_tensors")


def token_scales(linear: nn.Module, x: Tensor) -> Tensor | None:
    """The scales, [..., 1], that transformers' linear would find for the tokens of x; None where it has one in the file."""
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    arguments: Any = linear.quantization_scheme
    inputs = arguments.input_activations
    return compute_dynamic_scales_and_zp(x, inputs, linear)[0] if inputs.dynamic else None


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "transformers": Engine(("compressed_tensors",), "pip install 'qatrun[export]'", _open_transformers),
    }
)
