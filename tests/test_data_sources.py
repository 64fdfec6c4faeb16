"""Where text comes from: every kind of local source gives the same tokens, and what is wrong with one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from packed_text import SEQ_LEN, TOKENIZER, message_of, opened, other_text, tokens_of, write_rows

from qatrun import demo
from qatrun.data import check_data, open_dataset
from qatrun.errors import InputError
from qatrun.recipe import DataConfig, Source

pytestmark = pytest.mark.usefixtures("datasets_cache")

TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


def as_txt(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    return file


def as_json(folder: Path) -> Path:
    file = folder / "text.json"
    file.write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    return file


def as_jsonl(folder: Path) -> Path:
    return write_rows(folder / "text.jsonl", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])


def as_parquet(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "text.parquet")
    return folder / "text.parquet"


def as_folder(folder: Path) -> Path:
    (folder / "set").mkdir()
    write_rows(folder / "set" / "train.jsonl", [{"text": text} for text in TEXTS])
    write_rows(folder / "set" / "test.jsonl", [{"text": "w99"}])
    return folder / "set"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [as_txt, as_json, as_jsonl, as_parquet, as_folder])
def test_every_kind_of_local_source_gives_the_same_tokens(
    tmp_path: Path, write: Callable[[Path], Path], streaming: bool
) -> None:
    valid = other_text(tmp_path)
    data = opened(write(tmp_path), valid=valid, valid_sequences=1, shuffle=False, streaming=streaming)
    words = " <eos> ".join([*TEXTS, TEXTS[0]]) + " <eos>"
    assert tokens_of(data.train.take(1)) == TOKENIZER(words)["input_ids"][:SEQ_LEN]


@pytest.mark.parametrize(
    "settings",
    [{"split": "finetune"}, {"split": "train"}, {"split": "valid", "text_column": "txet"}]
    + [{"split": "valid", "messages_column": name} for name in ("text", "turns")],
)
def test_a_check_of_the_demo_says_what_opening_it_says(settings: dict[str, Any]) -> None:
    source = Source(path=demo.BUILTIN, **settings)
    try:
        open_dataset(source, "data.train")
        said = []
    except InputError as error:
        said = [*error.problems]
    assert check_data(DataConfig(train=source), None) == said
    assert (not said) == (settings == {"split": "finetune"})


def test_a_check_of_the_demo_writes_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    texts = demo.documents("valid")
    monkeypatch.setattr(demo, "documents", lambda _: (written.append(text) or text for text in texts))
    check_data(DataConfig(train=Source(path=demo.BUILTIN, split="valid")), TOKENIZER)
    assert len(written) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path, streaming: bool) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"texts": "w1", "label": 3}])
    message = message_of(file, streaming=streaming)
    assert message == f"data.train.text_column -- no column 'text' in {file} (did you mean 'texts'?)"
    assert "columns: texts, label" in message_of(file, text_column="zzz", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_holds_no_text_is_refused(tmp_path: Path, streaming: bool) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": "w1", "label": 3}])
    assert message_of(file, text_column="label", streaming=streaming).startswith("data.train.text_column -- ")
    message = message_of(file, messages_column="text", streaming=streaming)
    assert message.startswith("data.train.messages_column -- ")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["txt", "json", "jsonl", "parquet"])
def test_a_missing_file(tmp_path: Path, ending: str, streaming: bool) -> None:
    file = tmp_path / f"splits.{ending}"
    assert message_of(file, streaming=streaming) == f"data.train.path -- no such file '{file}'"


def test_a_file_of_a_kind_that_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.docx"
    file.write_text("text\nw1\n", encoding="utf-8")
    assert message_of(file).startswith(
        f"data.train.path -- '{file}' is none of .txt, .json, .jsonl, .csv, .tsv, .parquet ("
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_split(tmp_path: Path, streaming: bool) -> None:
    message = message_of(as_folder(tmp_path), split="vaild", streaming=streaming)
    assert message.startswith("data.train.split -- ")
    assert "vaild" in message
    assert "'test'" in message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", ""), ("a.jsonl", ""), ("a.txt", ""), ("a.json", "{not json\n"), ("a.jsonl", "{not json\n")],
)
def test_an_empty_or_broken_file(tmp_path: Path, name: str, content: str, streaming: bool) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert message_of(tmp_path / name, streaming=streaming).startswith(f"data.train.path -- {tmp_path / name}")


@pytest.mark.parametrize("streaming", [False, True])
def test_too_little_text(tmp_path: Path, streaming: bool) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": "w1 w2"}] * 3)
    assert "does not fill one sequence of 16 tokens" in message_of(file, streaming=streaming)
    file = write_rows(tmp_path / "b.jsonl", [{"text": "w1 w2"}] * 30)
    message = message_of(file, valid_sequences=50, streaming=streaming)
    assert message.startswith("data.valid_sequences -- ")
    assert "fills 5 sequences" in message
    file = write_rows(tmp_path / "c.jsonl", [{"text": "w1 w2 w3"}] * 4)
    message = message_of(file, valid_sequences=1, streaming=streaming)
    assert message.startswith("data.train.path -- ")
    assert "held out" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_text_are_no_documents(tmp_path: Path, streaming: bool) -> None:
    valid = other_text(tmp_path)
    rows = [{"text": text} for text in ("w1 w2", None, "", "w3", None)]
    settings: dict[str, Any] = {"valid": valid, "valid_sequences": 1, "shuffle": False, "streaming": streaming}
    data = opened(write_rows(tmp_path / "a.jsonl", rows), **settings)
    assert TOKENIZER.decode(tokens_of(data.train.take(1))[:6]) == "w1 w2 <eos> w3 <eos> w1"
    nothing = write_rows(tmp_path / "b.jsonl", [{"text": ""}, {"text": None}] * 10)
    with pytest.raises(InputError, match=r"data.train.path -- .* no text"):
        opened(nothing, **settings).train.take(1)
