"""Folders that engines read, each written from a frozen model: the codes and scales that were scored, never quantized anew.

`artifact` is written of every quantized arm, and is what is scored. The others are written from it when asked for; to add
one: a module beside it that is an `Export`, its place in `_ALL` and its name in `serving`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from qatrun.export import ascend_v1, compressed_tensors, hif8, hif8_ascend, onnx
from qatrun.export.folder import Stored
from qatrun.quant import QuantPlan


class Export(Protocol):
    """What writes a kind of folder, and reads the codes and scales back that it wrote.

    Attributes:
        NAME: by which a user asks for it; also that of its folder in an arm's.
        ENGINES: which of `evaluate.engines` open it; the first proves it.
    """

    NAME: str
    ENGINES: tuple[str, ...]

    def problems(self, plan: QuantPlan, model: nn.Module) -> Iterator[str]:
        """What of a plan the format cannot say, and what is nearest; the model with its linears as they were, on the meta
        device will do."""

    def notes(self, plan: QuantPlan) -> Iterator[str]:
        """What engines do otherwise than what was scored, or may not do."""

    def save(self, model: Any, tokenizer: Any, plan: QuantPlan, folder: Path) -> None:
        """Fill a folder from a frozen model (see `qatrun.quant.freeze`)."""

    def decoded_by(self, linears: Mapping[str, Stored]) -> str | None:
        """The package, of somebody else's, that reads the codes as the numbers that were scored, where there is one.

        Raises:
            ValueError: it reads other numbers.
        """

    def read(self, folder: Path) -> dict[str, Stored]:
        """The quantized linears in a folder by name."""


_ALL: tuple[Export, ...] = (compressed_tensors, onnx, hif8, hif8_ascend, ascend_v1)
EXPORTS: Mapping[str, Export] = MappingProxyType({export.NAME: export for export in _ALL})
