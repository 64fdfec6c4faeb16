"""Tokenizers that do not fit their model: one sentence before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import VOCAB_SIZE, tiny_llama, word_tokenizer

from qatrun.data import check_data
from qatrun.errors import InputError
from qatrun.recipe import DataConfig, ModelConfig, Source
from qatrun.tokenizer import load_tokenizer


def edited(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        change(content)
        (folder / file).write_text(json.dumps(content), encoding="utf-8")

    return edit


def with_tokens(*tokens: str, special: bool = False) -> Callable[[Path], object]:
    def add(folder: Path) -> None:
        tokenizer = word_tokenizer()
        tokenizer.add_tokens(list(tokens), special_tokens=special)
        tokenizer.save_pretrained(folder)

    return add


def without_files(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().config.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    return tmp_path


BEYOND = (
    f"the tokenizer knows {VOCAB_SIZE + 1} tokens, and the model's embedding has {VOCAB_SIZE} rows: 1 of them, such as "
)
UNREADABLE = "no tokenizer: its files are damaged, or of a newer version ("
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "added tokens": (with_tokens("<extra>"), f"{BEYOND}'<extra>' ({VOCAB_SIZE})"),
    "another model's": (
        edited("config.json", lambda d: d.update(vocab_size=50)),
        f"the tokenizer knows {VOCAB_SIZE} tokens, and the model's embedding has 50 rows: {VOCAB_SIZE - 50} of them",
    ),
    "an EOS without a row": (
        edited("tokenizer_config.json", lambda d: d.update(eos_token="<end>")),
        f"{BEYOND}'<end>' ({VOCAB_SIZE})",
    ),
    "a gap in the ids": (
        edited("tokenizer.json", lambda d: d["model"]["vocab"].update(far=10**6)),
        f"{BEYOND}'far' (1000000)",
    ),
    "neither BOS nor EOS": (
        edited("tokenizer_config.json", lambda d: d.pop("eos_token")),
        "the tokenizer has neither BOS nor EOS",
    ),
    "a newer model": (edited("tokenizer.json", lambda d: d["model"].update(type="Future")), UNREADABLE),
    "a newer file": (edited("tokenizer.json", lambda d: d.update(version="9.0")), UNREADABLE),
    "no JSON": (lambda folder: (folder / "tokenizer.json").write_text("<html>", encoding="utf-8"), UNREADABLE),
    "another JSON": (lambda folder: (folder / "tokenizer.json").write_text("[]", encoding="utf-8"), UNREADABLE),
    "a length that is none": (
        edited("tokenizer_config.json", lambda d: d.update(model_max_length="long")),
        UNREADABLE,
    ),
    "none": (without_files, "no tokenizer: the folder holds no tokenizer.json, and no other vocabulary"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tokenizer_that_does_not_fit(folder: Path, case: str) -> None:
    change, expected = CASES[case]
    change(folder)
    with pytest.raises(InputError) as caught:
        load_tokenizer(ModelConfig(path=str(folder)))
    assert str(caught.value).startswith(f"model.path -- {folder}: {expected}")
    assert len(caught.value.problems) == 1


def test_a_padding_token_needs_no_row_until_a_text_holds_it(folder: Path) -> None:
    """Many a fine-tune adds `[PAD]` and resizes nothing; Gemma 3 has a token for images beyond its embedding."""
    with_tokens("[PAD]", special=True)(folder)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    assert tokenizer.num_embeddings == VOCAB_SIZE
    text = folder / "text.txt"

    def problems() -> list[str]:
        return [str(problem) for problem in check_data(DataConfig(train=Source(path=str(text)), seq_len=2), tokenizer)]

    text.write_text("w1 w2\n\n" * 200, encoding="utf-8")
    assert problems() == []
    text.write_text("w1 w2\n\n" * 200 + "w1 [PAD]", encoding="utf-8")
    message = f"its token '[PAD]' has the id {VOCAB_SIZE}, and the model's embedding {VOCAB_SIZE} rows"
    assert problems() == [f"data.train.text_column -- {text}, line 401: {message}"]
