"""Small texts of made-up words, opened as a run opens its data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from builders import word_tokenizer
from training import write_texts

from qatrun.data import Batch, open_data
from qatrun.errors import InputError
from qatrun.recipe import DataConfig, Source

SEQ_LEN = 16
TOKENIZER = word_tokenizer()


def opened(path: Path | str, *, seed: int = 0, tokenizer: Any = TOKENIZER, **settings: Any) -> Any:
    valid = settings.pop("valid", None)
    config: dict[str, Any] = {"seq_len": SEQ_LEN, "valid_sequences": settings.pop("valid_sequences", 2), "valid": valid}
    return open_data(DataConfig(train=Source(path=str(path), **settings), **config), tokenizer, seed)


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def other_text(folder: Path) -> Source:
    return Source(path=str(write_texts(folder / "other.jsonl", 10, seed=1)))


def tokens_of(*batches: Batch) -> list[int]:
    return [token for batch in batches for token in batch.input_ids.flatten().tolist()]


def message_of(path: Path | str, **settings: Any) -> str:
    with pytest.raises(InputError) as raised:
        opened(path, **settings)
    return str(raised.value)
