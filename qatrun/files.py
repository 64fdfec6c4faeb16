"""Files of ours: written whole or not at all, and read by one reader that says which file is not what it should be."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from qatrun.errors import DamagedFileError, Problem, QatrunError, WriteError
from qatrun.layout import PARTIAL, UNFINISHED

T = TypeVar("T")

# How safetensors and tokenizers (Rust), and Arrow, name an error of the operating system in their own exceptions.
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)


class Record(BaseModel):
    """What a JSON file holds: fields by the names that stand in the file, checked where it is made and where it is read.
    Keys that are no field, of another version's, are let through and kept."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", populate_by_name=True)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in its file: what it was given."""
        return self.model_dump(by_alias=True, exclude_unset=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence what the operating system has against a write, whichever library met it.

    Raises:
        WriteError: a full disk, a missing permission, a file where a folder should be.
    """
    try:
        yield
    except QatrunError:
        raise
    except Exception as error:
        reason = _os_reason(error)
        if reason is None:
            raise
        raise WriteError(f"cannot write {path}: {reason}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`, which it becomes when the block has ended: whole, on the disk, and with the mode
    of any new file.

    Raises:
        WriteError: it cannot be written; what was there before is still there.
    """
    partial = path.with_name(PARTIAL.replace("*", path.name))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.chmod(_new_file_mode())  # safetensors would have it readable by its owner alone
            flush_to_disk(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def filled_folder(folder: Path) -> Iterator[None]:
    """Let a library write its files into a folder of ours; weights get the mode of any new file.

    Raises:
        WriteError: they cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(UNFINISHED):
            left.unlink()
        yield
        for file in folder.glob("*.safetensors"):
            file.chmod(_new_file_mode())


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill in place of `path`, which it becomes when the block has ended: whole, on the disk, its files with the
    mode of any new file.

    Raises:
        WriteError: it cannot be written; what was there before is still there.
    """
    partial, earlier = (path.with_name(f".{path.name}.{state}") for state in ("partial", "earlier"))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in (partial, earlier):
            shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    file.chmod(_new_file_mode())
                flush_to_disk(file)
            if path.exists():
                path.rename(earlier)
            partial.rename(path)
            flush_to_disk(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if earlier.exists() and not path.exists():
                earlier.rename(path)
            raise
        shutil.rmtree(earlier, ignore_errors=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write the file whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_json(file: Path, value: Any) -> None:
    """Write a record, or plain data, as JSON: whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    plain = value.to_dict() if isinstance(value, Record) else value
    replace_file(file, (json.dumps(plain, indent=2) + "\n").encode())


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Say in one sentence that a file of ours is not what it should be, whatever its library makes of that.

    Raises:
        DamagedFileError: anything that went wrong while reading.
    """
    try:
        yield
    except QatrunError:
        raise
    except Exception as error:  # torn or nonsensical content makes every parser fail in its own way
        raise DamagedFileError(Problem(f"{file} cannot be read: {_reason(error)}")) from error


def read_json(file: Path, kind: type[T]) -> T:
    """What a JSON file holds.

    Args:
        kind: what it must be, such as a Record; for any other type the plain data as it stands.
    Raises:
        DamagedFileError: it is missing, torn or something else.
    """
    with reading(file):
        return _conforming(json.loads(file.read_text(encoding="utf-8")), kind)


def read_rows(file: Path, kind: type[T], *, skip_damaged: bool = False) -> list[T]:
    """The rows of a .jsonl file in order; a last line that a crash cut short is left out.

    Args:
        kind: as of `read_json`, of each row.
        skip_damaged: leave out every line that cannot be read.
    Raises:
        DamagedFileError: it is missing, or a line is something else.
    """
    rows: list[T] = []
    with reading(file):
        *lines, _unfinished = file.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(_conforming(json.loads(line), kind))
            except (ValueError, RecursionError) as error:
                if not skip_damaged:
                    raise ValueError(f"line {number}: {_reason(error)}") from error
    return rows


def sha256(file: Path) -> str:
    """Checksum of a file's content, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_sha256(file: Path) -> str:
    """`sha256`, taken once for as long as the file stays as it is: nobody can set back the time of its last change."""
    stat = file.stat()
    return _sha256_of(file, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@cache
def _sha256_of(file: Path, *_signature: int) -> str:
    return sha256(file)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or what a folder lists, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _conforming(value: Any, kind: type[T]) -> T:
    """The record that plain data stand for; where `kind` is no Record, the data themselves.

    Raises:
        ValueError: they are not of that kind.
    """
    hashable: Any = kind
    checked: T = _adapter(hashable).validate_python(value, strict=True)
    return checked if isinstance(checked, Record) else value


def _new_file_mode() -> int:
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    return 0o666 & ~umask


def _os_reason(error: Exception) -> str | None:
    """What the operating system said; None where it is another kind of error."""
    found = _OS_ERROR.search(str(error))
    if found is not None:
        return os.strerror(int(found.group(1) or found.group(2)))
    return str(error) if isinstance(error, OSError) else None


def _reason(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        place, message = ".".join(map(str, first["loc"])), first["msg"].partition(" or instance of ")[0]
        return f"{place}: {message}" if place else message
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n")[0] or type(error).__name__
