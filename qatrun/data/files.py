"""Local text: which files a path means, and their rows, each with the place that a message can name."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLITS = {word: split for split, words in SPLIT_WORDS.items() for word in words}
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class UnreadableError(Exception):
    """A file or a row that cannot be read; the message names it and says why."""


class Row(NamedTuple):
    """A row of a file: `where` names both, `values` are its columns."""

    where: str
    values: Any


def ending(file: Path) -> str | None:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.gz`; None where the file is of no kind that is read."""
    suffix = (Path(file.stem) if file.suffix in COMPRESSIONS else file).suffix.lower()
    return suffix if suffix in READERS or (suffix == ".parquet" and file.suffix not in COMPRESSIONS) else None


def endings() -> str:
    """What can be read, in words."""
    return f"{', '.join((*READERS, '.parquet'))} (all but the last also with {', '.join(COMPRESSIONS)})"


def files_by_split(path: Path) -> dict[str, list[Path]]:
    """Split -> files that can be read, in order; a file alone is `train`, and so is a folder whose names tell no split.

    In a folder, at any depth, what begins with a dot is left out, files of other kinds too, and .txt files where there are
    files of rows beside them: those are notes on the data.

    Raises:
        UnreadableError: a folder that `Dataset.save_to_disk` wrote.
    """
    if not path.is_dir():
        return {"train": [path]} if path.is_file() and ending(path) else {}
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        raise UnreadableError(f"{path} was written by Dataset.save_to_disk: write it with Dataset.to_parquet instead")
    files = [file for file in sorted(path.rglob("*")) if ending(file) and not file.is_dir() and _is_seen(file, path)]
    files = [file for file in files if ending(file) != ".txt"] or files
    found: dict[str, list[Path]] = {}
    for file in files:
        if split := _split_of(file.relative_to(path)):
            found.setdefault(split, []).append(file)
    return found or ({"train": files} if files else {})


def _is_seen(file: Path, folder: Path) -> bool:
    return not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)


def _split_of(file: Path) -> str | None:
    """The split that a name tells: `data/train-00000-of-00002.parquet`, `my_test.jsonl`, `valid/a.jsonl`."""
    stem = file.name.split(".")[0]
    if shard := SHARD.fullmatch(stem):
        return SPLITS.get(shard[1], shard[1])
    for part in (stem, *reversed(file.parent.parts)):
        if split := next((SPLITS[word] for word in re.split(r"[^a-z0-9]+", part.lower()) if word in SPLITS), None):
            return split
    return None


def read_rows(file: Path, column: str) -> Iterator[Row]:
    """The rows of a file.

    Args:
        column: read no other where the format allows it.
    Raises:
        UnreadableError: a file that cannot be read, or a row that is none.
    """
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(file.open("rb"))
            if raw.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
                raise UnreadableError(f"{file} is a pointer of Git LFS, not the file: `git lfs pull` fetches it")
            kind = ending(file)
            if kind is None or kind == ".parquet":
                yield from _parquet_rows(raw, file, column)
                return
            stream: IO[bytes] = raw
            if file.suffix in COMPRESSIONS:
                inner = stack.enter_context(pa.input_stream(raw, compression=COMPRESSIONS[file.suffix]))
                stream = io.BufferedReader(inner)
            yield from READERS[kind](stream, file)
    except (OSError, pa.ArrowException) as error:
        raise UnreadableError(f"{file}: {(getattr(error, 'strerror', None) or str(error)).splitlines()[0]}") from error


def _parquet_rows(stream: IO[bytes], file: Path, column: str) -> Iterator[Row]:
    parquet = pq.ParquetFile(stream)
    names = parquet.schema_arrow.names
    batches = parquet.iter_batches(columns=[column] if column in names else names, batch_size=1000)
    for number, values in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
        yield Row(f"{file}, row {number}", values)


def _json_lines(stream: Iterable[bytes], file: Path) -> Iterator[Row]:
    return (Row(where, _parsed(text, where)) for where, text in _texts(stream, file, "row") if text.strip())


def _json(stream: IO[bytes], file: Path) -> Iterator[Row]:
    """A list of rows, a row a line, or one row."""
    first = stream.readline()
    if not first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") and _is_json(first):
        yield from _json_lines(chain([first], stream), file)
        return
    text = "".join(text for _, text in _texts(chain([first], stream), file, "line"))
    rows = _parsed(text, str(file)) if text.strip() else []
    for number, values in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield Row(f"{file}, row {number}", values)


def _csv_rows(delimiter: str) -> Callable[[Iterable[bytes], Path], Iterator[Row]]:
    def read(stream: Iterable[bytes], file: Path) -> Iterator[Row]:
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader((text for _, text in _texts(stream, file, "line")), delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            for number, fields in enumerate(filter(None, reader), 1):
                if len(fields) != len(header):
                    message = f"{len(fields)} fields, where the header has {len(header)} (line {reader.line_num})"
                    raise UnreadableError(f"{file}, row {number}: {message}")
                yield Row(f"{file}, row {number}", dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            raise UnreadableError(f"{file}, line {reader.line_num}: {error}") from None

    return read


def _paragraphs(stream: Iterable[bytes], file: Path) -> Iterator[Row]:
    """Documents that empty lines part."""
    begins, lines = "", []
    for where, text in chain(_texts(stream, file, "line"), [("", "\n")]):
        line = text.replace("\r\n", "\n")
        if line != "\n":
            begins = begins or where
            lines.append(line)
        elif begins:
            yield Row(begins, {"text": "".join(lines).removesuffix("\n")})
            begins, lines = "", []


def _texts(stream: Iterable[bytes], file: Path, unit: str) -> Iterator[tuple[str, str]]:
    """(`a.jsonl, row 3`, its text) line by line."""
    for number, line in enumerate(stream, 1):
        where = f"{file}, {unit} {number}"
        try:
            yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UnreadableError(f"{where}: not UTF-8 text (byte 0x{line[error.start]:02x})") from None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UnreadableError(f"{where}: not JSON ({error!s:.80}; it begins with {text.strip()!r:.60})") from None
    except RecursionError:
        raise UnreadableError(f"{where}: JSON that is nested too deeply") from None


READERS: Mapping[str, Callable[[Any, Path], Iterator[Row]]] = {
    ".txt": _paragraphs,
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv_rows(","),
    ".tsv": _csv_rows("\t"),
}
