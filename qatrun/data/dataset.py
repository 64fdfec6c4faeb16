"""The rows of a source as a data set, and as documents.

Local files are read here, row by row, so that one that cannot be used is named; `datasets` keeps what was read as Arrow,
under a hash of the files' content, and shuffles and streams it. What is on the hub, `datasets` reads by itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets

from qatrun import demo
from qatrun.data.columns import Document, as_document, demo_documents
from qatrun.data.files import SPLITS, UnreadableError, ending, endings, files_by_split, read_rows
from qatrun.errors import InputError, Problem, QatrunError, SourceError
from qatrun.files import sha256
from qatrun.hub import ask_once, hub_is_reachable
from qatrun.recipe import Source

CACHE_VERSION = 1
# How local documents are kept: a conversation as JSON, which unlike Arrow leaves each turn the keys that it has.
FEATURES = datasets.Features({"content": datasets.Value("large_string"), "where": datasets.Value("string")})

Record = Mapping[str, Any]


def open_dataset(source: Source, key: str) -> datasets.Dataset | datasets.IterableDataset:
    """The data set of a source: `FEATURES`, or the column of one that `datasets` reads. Fetches no more than it must: a
    stream only its first row.

    Raises:
        InputError: no such data set, split or column, no rows, or one that holds no text.
    """
    try:
        dataset = _load(source, key)
        first = next(iter(dataset.take(1)), None)
    except Exception as error:
        if not _is_of_the_source(error, source):
            raise
        # `datasets` wraps what reading raises in an error that does not say what is wrong.
        told = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        if isinstance(told, InputError):
            raise told from None
        if "corresponds to no data" in str(told):
            raise InputError(Problem(f"{source.path} has no rows", key=f"{key}.path")) from error
        where = "split" if isinstance(error, ValueError) and "split" in str(error) else "path"
        reason = _reason(told or error)
        if isinstance(error, ConnectionError) and not hub_is_reachable():
            reason = "no such file or folder, and the hub cannot be reached"
        raise InputError(Problem(f"{source.path}: {reason}", key=f"{key}.{where}")) from error
    if first is None:
        raise InputError(Problem(f"{source.path} has no rows", key=f"{key}.path"))
    if not FEATURES.keys() <= first.keys():
        as_document(first, f"{source.path}, row 1", source, key)
        dataset = dataset.select_columns([source.column])
    return dataset


def read_documents(source: Source, key: str) -> Iterator[Document | None]:
    """The documents of a source other than the demo's, from its first row on, in one pass that reads no further than it is
    followed.

    Raises:
        InputError: as for `open_dataset`.
        SourceError: it breaks off.
    """
    files = local_files(source, key)
    if files is not None and "[" not in source.split:
        yield from _documents_of_files(files, source, key)
        return
    dataset = open_dataset(source, key)
    with reading_on(source, key):
        for index, row in enumerate(dataset):
            yield document_of(row, source, key, index)


def local_files(source: Source, key: str) -> list[Path] | None:
    """The files of a local source; None for what `datasets` finds: on the hub, or a subset of a folder.

    Raises:
        InputError: no such file or split, or none that can be read.
    """
    if _is_left_to_datasets(source):
        return None
    path = Path(source.path)
    try:
        if not path.exists():
            raise UnreadableError(f"no such file {'' if ending(path) else 'or folder '}'{path}'")
        found = files_by_split(path)
        if not found:
            raise UnreadableError(f"'{path}' {'holds no file of' if path.is_dir() else 'is none of'} {endings()}")
    except (OSError, UnreadableError) as error:
        message = f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise InputError(Problem(message, key=f"{key}.path")) from None
    name = source.split.partition("[")[0]
    split = SPLITS.get(name, name)
    if split not in found:
        splits = ", ".join(f"'{split}'" for split in found)
        raise InputError(Problem(f"no split '{name}' in {path} (there: {splits})", key=f"{key}.split"))
    return found[split]


def _is_left_to_datasets(source: Source) -> bool:
    """Whether `datasets` finds and reads it: on the hub, or a subset of a folder."""
    path = Path(source.path)
    with suppress(OSError):
        if path.exists():
            return path.is_dir() and source.subset is not None
    is_name = not (ending(path) or path.is_absolute() or source.path.startswith("."))
    return is_name and source.path != demo.BUILTIN


@contextmanager
def reading_on(source: Source, key: str) -> Iterator[None]:
    """Say in a sentence why the rows of a data set that could be opened break off.

    Raises:
        SourceError: the network, the hub or the disk; whatever `datasets` and the formats that it reads raise.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_the_source(error, source):
            raise
        raise SourceError(f"{key} -- {source.path} broke off while it was read: {_reason(error)}") from error


def _is_of_the_source(error: Exception, source: Source) -> bool:
    """Whether it is the source's, or the network's, that reading raised this. `datasets` and the formats that it reads
    raise anything; local files are read here, where anything odd would be a mistake of ours."""
    if isinstance(error, QatrunError | MemoryError):
        return False
    of_any = isinstance(error, OSError | ValueError | datasets.exceptions.DatasetsError)
    return of_any or _is_left_to_datasets(source)


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def content_hash(files: Sequence[Path]) -> str:
    """SHA-256 over names and content, hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        seen = file.stat()
        digest.update(f"{file}\0{_file_hash(file, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)}\0".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_hash(file: Path, *_stamps: int) -> str:
    return sha256(file)


def _load(source: Source, key: str) -> Any:
    if source.path == demo.BUILTIN:
        return datasets.Dataset.from_list([record(document, source) for document in demo_documents(source, key)])
    files = local_files(source, key)
    if files is None:
        return _load_by_name(source)
    of_files = {"files": files, "source": source, "key": key}
    is_sliced = "[" in source.split
    if source.streaming:
        if is_sliced:
            raise ValueError("a stream takes no part of a split")
        return datasets.IterableDataset.from_generator(_records, features=FEATURES, gen_kwargs=of_files)
    # Not by path and time, as `datasets` does by itself: a copy may bring other content with the same time.
    settings = source.model_dump_json(include={"text_column", "messages_column", "roles"})
    fingerprint = hashlib.sha256(f"{CACHE_VERSION}{settings}{content_hash(files)}".encode()).hexdigest()
    dataset = datasets.Dataset.from_generator(_records, FEATURES, gen_kwargs=of_files, fingerprint=fingerprint)
    return _sliced(dataset, source.split) if is_sliced else dataset


def _sliced(dataset: datasets.Dataset, split: str) -> datasets.Dataset:
    """The part of a split that `train[:10%]` means."""
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: len(dataset)})
    except ValueError:
        raise ValueError(f"'{split}' is no part of a split, such as 'train[:10%]'") from None
    return dataset.select([row for part in parts for row in range(part.from_, part.to)])


def _load_by_name(source: Source) -> Any:
    options: dict[str, Any] = {"split": source.split, "streaming": source.streaming}
    folder = Path(source.path)
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        options["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / content_hash(files))
    else:
        ask_once()
    return datasets.load_dataset(source.path, source.subset, **options)


def _documents_of_files(files: Sequence[Path], source: Source, key: str) -> Iterator[Document | None]:
    try:
        for file in files:
            for row in read_rows(file, source.column):
                yield as_document(row.values, row.where, source, key)
    except UnreadableError as error:
        raise InputError(Problem(str(error), key=f"{key}.path")) from None


def _records(files: Sequence[Path], source: Source, key: str) -> Iterator[Record]:
    return (record(document, source) for document in _documents_of_files(files, source, key))


def record(document: Document | None, source: Source) -> Record:
    """A row of `FEATURES`."""
    if document is None:
        return {"content": None, "where": ""}
    content = json.dumps(document.content, default=str) if source.messages_column else document.content
    return {"content": content, "where": document.where}


def document_of(row: Record, source: Source, key: str, index: int | None = None) -> Document | None:
    """The document in a row of `open_dataset`; None where it holds none.

    Args:
        index: of the row, where it is known.
    Raises:
        InputError: as for `as_document`.
    """
    if not FEATURES.keys() <= row.keys():
        where = source.path if index is None else f"{source.path}, row {index + 1}"
        return as_document(row, where, source, key)
    content = row["content"]
    if content is None:
        return None
    return Document(json.loads(content) if source.messages_column else content, row["where"])
