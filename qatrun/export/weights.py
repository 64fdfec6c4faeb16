"""Weights on disk: in files of at most 5 GB, by huggingface_hub's splitter; read tensor by tensor, when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor

from qatrun.files import reading, sha256
from qatrun.model import MAX_SHARD

WEIGHTS = "model{suffix}.safetensors"


def write_weights(tensors: Mapping[str, Tensor], folder: Path, pattern: str = WEIGHTS) -> None:
    """Write them in place of the weights of that pattern, with an index where they are several files."""
    metadata = {"format": "pt"}
    save_torch_state_dict(dict(tensors), folder, filename_pattern=pattern, max_shard_size=MAX_SHARD, metadata=metadata)


def weights_files(folder: Path, pattern: str = WEIGHTS) -> list[Path]:
    """The files that hold a folder's weights, in order."""
    return sorted(folder.glob(pattern.format(suffix="*")))


def weights_sha256(folder: Path) -> str:
    """Checksum of the content of a folder's weights: that of the file, or of the checksums of several."""
    sums = [sha256(file) for file in weights_files(folder)]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read anew whenever it is asked for, so that few are in memory at once.

    Raises:
        DamagedFileError: there is no such file, or it cannot be read.
    """

    def __init__(self, folder: Path, pattern: str = WEIGHTS) -> None:
        self._folder, self._open = folder, ExitStack()
        self._of: dict[str, tuple[Path, Any]] = {}
        for file in weights_files(folder, pattern) or [folder / pattern.format(suffix="")]:
            with reading(file):
                opened: Any = self._open.enter_context(safe_open(file, framework="pt"))
                self._of |= dict.fromkeys(opened.keys(), (file, opened))

    def __getitem__(self, name: str) -> Tensor:
        file, opened = self._of[name]
        with reading(file):
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    @property
    def place(self) -> Path:
        """What holds them: the file, or the folder where they are several."""
        files = {file for file, _ in self._of.values()}
        return files.pop() if len(files) == 1 else self._folder
