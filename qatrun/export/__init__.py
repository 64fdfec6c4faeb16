"""Folders that engines read, each written from a frozen model: the codes and scales that were scored, never quantized anew.

To add one: a module beside `artifact` that is an `Export`, and a line in `EXPORTS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from qatrun.export import artifact
from qatrun.quant import QuantPlan


class Export(Protocol):
    """What writes a kind of folder; reading one back is the engine's that it is for.

    Attributes:
        FOLDER: its name in an arm's folder.
    """

    FOLDER: str

    def save(self, model: Any, tokenizer: Any, plan: QuantPlan, folder: Path) -> None:
        """Write a frozen model (see `qatrun.quant.freeze`).

        Raises:
            WriteError: it cannot be written.
        """


# Written of every quantized arm.
EXPORTS: tuple[Export, ...] = (artifact,)
