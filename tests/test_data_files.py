"""Files as other tools write them: every kind gives the same documents, and one that cannot be used is named."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from builders import word_tokenizer

from qatrun.data import check_data, count_tokens, open_data, open_dataset
from qatrun.data.dataset import read_documents
from qatrun.errors import InputError
from qatrun.recipe import DataConfig, Source

TOKENIZER = word_tokenizer()
TEXTS = ["w1 w2 w3", "w4 w5", 'w6 "w7", w8\nw9 é']
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]

pytestmark = pytest.mark.usefixtures("datasets_cache")


def jsonl(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def delimited(delimiter: str) -> bytes:
    lines: list[str] = []
    writer = csv.writer(type("Lines", (), {"write": staticmethod(lines.append)}), delimiter=delimiter)
    writer.writerows([("id", "text"), *((row["id"], row["text"]) for row in ROWS)])
    return "".join(lines).encode()


def compressed(kind: str, content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, kind) as stream:
        stream.write(content)
    return bytes(sink.getvalue())


BOM = b"\xef\xbb\xbf"
FILES: dict[str, bytes] = {
    "a.jsonl": jsonl(ROWS),
    "bom.jsonl": BOM + jsonl(ROWS),
    "blank-lines.jsonl": jsonl(ROWS).replace(b"\n", b"\r\n\r\n").removesuffix(b"\r\n"),
    "a.JSONL": jsonl(ROWS),
    "a.jsonl.gz": gzip.compress(jsonl(ROWS[:1])) + gzip.compress(jsonl(ROWS[1:])),
    "a.jsonl.zst": compressed("zstd", jsonl(ROWS)),
    "a.jsonl.bz2": compressed("bz2", jsonl(ROWS)),
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": jsonl(ROWS),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv": delimited(","),
    "a.csv.gz": gzip.compress(delimited(",")),
    "a.tsv": delimited("\t"),
    "a.txt": "\n\n".join(TEXTS).encode(),
    "a.txt.zst": compressed("zstd", "\r\n\r\n".join(TEXTS).encode()),
}


def texts(path: Path, **settings: Any) -> list[str]:
    source = Source(path=str(path), **settings)
    read = [str(document.content) for document in read_documents(source, "data.train") if document is not None]
    assert [row["content"] for row in open_dataset(source, "data.train")] == read
    return read


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str, streaming: bool) -> None:
    folder = tmp_path / "[v2] *data?"  # no pattern: a name
    folder.mkdir()
    (folder / name).write_bytes(FILES[name])
    assert texts(folder / name, streaming=streaming) == TEXTS
    assert texts(folder, streaming=streaming) == TEXTS


def test_a_folder_of_several_kinds_and_splits(tmp_path: Path) -> None:
    for name in ("train/a.jsonl.gz", "train/deep/b.csv", "c-test.jsonl", ".hidden/x.jsonl", "README.md", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(FILES.get(name.split("/")[-1].replace("b.csv", "a.csv"), FILES["a.jsonl"]))
    assert texts(tmp_path) == TEXTS * 2
    assert texts(tmp_path, split="test") == TEXTS
    with pytest.raises(InputError, match=r"data\.train\.split -- no split 'validation' in .* \(there: '.*', '.*'\)"):
        texts(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/sft-00001-of-00002.parquet", "sft"),
        ("my_dev.jsonl", "validation"),
        ("valid/a.jsonl", "validation"),
    ],
)
def test_splits_are_told_from_names(tmp_path: Path, name: str, split: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if name.endswith(".parquet"):
        datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]}).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(FILES["a.jsonl"])
    assert texts(tmp_path, split=split) == TEXTS


GOOD = [{"text": "w1 w2"}] * 30
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "number.jsonl": (jsonl([*GOOD, {"text": 2024}]), "text_column -- {}, row 31: column 'text' holds no text (got 2024)"),
    "list.jsonl": (jsonl([*GOOD, {"text": ["a"]}]), "text_column -- {}, row 31: column 'text' holds no text (got ['a'])"),
    "mapping.jsonl": (jsonl([{"text": {"a": 1}}]), "text_column -- {}, row 1: column 'text' holds no text (got {{'a': 1}})"),
    "bool.jsonl": (jsonl([{"text": True}]), "text_column -- {}, row 1: column 'text' holds no text (got True)"),
    "null-first.jsonl": (jsonl([{"text": None}, {"text": 1}]), "text_column -- {}, row 2: column 'text' holds no text"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', "text_column -- {}, row 1: 'utf-8' codec can't encode character"),
    "other.jsonl": (jsonl([*GOOD, {"txet": "a"}]), "text_column -- no column 'text' in {}, row 31 (did you mean 'txet'?)"),
    "no-mapping.jsonl": (jsonl([*GOOD, "words"]), "path -- {}, row 31: no mapping of columns to values (got 'words')"),
    "latin.jsonl": (jsonl(GOOD) + b'{"text": "caf\xe9"}', "path -- {}, row 31: not UTF-8 text (byte 0xe9)"),
    "utf16.txt": ("w1".encode("utf-16"), "path -- {}, line 1: not UTF-8 text (byte 0xff)"),
    "cut.jsonl": (jsonl(GOOD) + b'{"text": "w1', "path -- {}, row 31: not JSON (Unterminated string"),
    "deep.jsonl": (b"[" * 100_000, "path -- {}, row 1: JSON that is nested too deeply"),
    "digits.jsonl": (b'{"text": "", "n": ' + b"9" * 5000 + b"}", "path -- {}, row 1: not JSON (Exceeds the limit"),
    "named-wrongly.jsonl": (gzip.compress(jsonl(GOOD)), "path -- {}, row 1: not UTF-8 text (byte 0x8b)"),
    "cut.jsonl.gz": (gzip.compress(jsonl(GOOD * 9))[:-20], "path -- {}: Truncated compressed stream"),
    "no.jsonl.gz": (b"words", "path -- {}: zlib inflate failed"),
    "no.jsonl.zst": (b"words", "path -- {}: ZSTD decompress failed"),
    "fields.csv": (b"text,id\nw1,1\nw2,2,3\n", "path -- {}, row 2: 3 fields, where the header has 2 (line 3)"),
    "quote.csv": (b'text\n"w1 w2\nw3\n', "path -- {}, line 3: unexpected end of data"),
    "no.parquet": (b"PAR1 words", "path -- {}: "),
    "empty.parquet": (b"", "path -- {}: "),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "path -- {} is a pointer of Git LFS"),
    "empty.jsonl": (b"", "path -- {} has no rows"),
    "blank.txt": (b"\n\n \n".replace(b" ", b""), "path -- {} has no rows"),
    "header-alone.csv": (b"text\n", "path -- {} has no rows"),
    "nothing.jsonl": (jsonl([{"text": ""}] * 9), "path -- {} has rows but no text to train on"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    """By check, and where training begins."""
    content, expected = BAD_FILES[name]
    file = tmp_path / name
    file.write_bytes(content)
    config = DataConfig(train=Source(path=str(file)), seq_len=4, valid_sequences=1)
    (problem,) = check_data(config, TOKENIZER)
    assert str(problem).startswith(f"data.train.{expected.format(file)}")
    for streaming in (False, True):
        with pytest.raises(InputError):
            open_data(
                config.model_copy(update={"train": Source(path=str(file), streaming=streaming)}), TOKENIZER, 0
            ).train.take(20)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.mkdir(), "' holds no file of .txt, .json"),
        (lambda path: path.symlink_to("/dev/zero"), "' is none of .txt, .json"),
        (lambda path: (path.mkdir(), (path / "a.jsonl").symlink_to("nowhere")), "/a.jsonl: No such file or directory"),
        (lambda path: datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(path), " was written by Dataset.save_to"),
        (lambda path: None, "no such file or folder '"),
        (lambda path: (path.mkdir(), (path / "a.jsonl").write_bytes(jsonl(GOOD)),
                       (path / "b.jsonl").write_bytes(jsonl([{"body": "w1"}]))),
         "no column 'text' in {}/b.jsonl (columns: body)"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], object], expected: str) -> None:
    path = tmp_path / "set"
    make(path)
    (problem,) = check_data(DataConfig(train=Source(path=str(path))), TOKENIZER)
    assert expected.format(path) in str(problem)


def test_a_part_of_a_split(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(ROWS * 4))
    source = Source(path=str(file), split="train[50%:]")
    assert len(open_dataset(source, "data.train")) == len(list(read_documents(source, "data.train"))) == 6
    with pytest.raises(InputError, match=r"data\.train\.split -- "):
        open_dataset(Source(path=str(file), split="train[x:]"), "data.train")
    with pytest.raises(InputError, match=r"data\.train\.split -- .* a stream takes no part of a split"):
        open_dataset(Source(path=str(file), split="train[:2]", streaming=True), "data.train")


def test_content_not_its_date_tells_a_file_from_what_was_read_before(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for text in ("w1 w2", "w3 w4"):
        file.write_bytes(jsonl([{"text": text}]))
        os.utime(file, (10**9, 10**9))
        assert texts(file) == [text]


def test_a_row_is_named_where_it_was_not_seen_by_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatrun.data.check.SAMPLE_ROWS", 10)
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl([*GOOD, {"text": 5}]))
    config = DataConfig(train=Source(path=str(file)), seq_len=4, valid_sequences=1)
    assert check_data(config, TOKENIZER) == []
    with pytest.raises(InputError, match="row 31"):
        open_data(config, TOKENIZER, 0)


@pytest.mark.parametrize("sampled", [10, 500_000])
def test_tokens_of_a_text_are_counted_from_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: int
) -> None:
    monkeypatch.setattr("qatrun.data.check.SAMPLE_CHARACTERS", sampled)
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl([{"text": "w1 w2 w3"}] * 50 + [{"text": None}]))
    source = Source(path=str(file))
    assert count_tokens(source, "data.train", TOKENIZER) == 50 * len(TOKENIZER("w1 w2 w3 </s>")["input_ids"])
    assert count_tokens(source.model_copy(update={"streaming": True}), "data.train", TOKENIZER) is None
    monkeypatch.setattr("qatrun.data.check.COUNTED_CHARACTERS", 8 * 49)
    assert count_tokens(source, "data.train", TOKENIZER) is None


ONE = "the one document is held out for perplexity, and none is left to train on: give data.valid"


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        (["w1 " * 400], {}, f"data.train.path -- {ONE}"),
        (["w1 " * 300_000], {}, f"data.train.path -- {ONE}"),
        (["w1 " * 3] * 2, {"valid_sequences": 2}, "data.train.path -- all 2 documents are held out"),
        (["w1 w2"], {"seq_len": 64}, "data.train.path -- {} does not fill one sequence of 64 tokens"),
        (
            ["w1 w2"] * 9,
            {"valid_sequences": 99},
            "data.valid_sequences -- {} fills 6 sequences of 4 tokens, not the 99",
        ),
    ],
)
def test_too_little_text_is_told_by_check(
    tmp_path: Path, rows: Sequence[str], settings: Mapping[str, Any], expected: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl([{"text": text} for text in rows]))
    shape = {"seq_len": 4, "valid_sequences": 1} | dict(settings)
    (problem,) = check_data(DataConfig(train=Source(path=str(file)), **shape), TOKENIZER)
    assert str(problem).startswith(expected.format(file))
    with_valid = DataConfig(train=Source(path=str(file)), valid=Source(path="builtin:demo", split="valid"), **shape)
    assert check_data(with_valid, TOKENIZER) == []
