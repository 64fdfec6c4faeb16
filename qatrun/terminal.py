"""Standard streams as they come: closed, broken, of any encoding, of any width.

A reader that stops reading (`| head`) stops no run: what it does not want is dropped, and the exit code stays that of the
result. Characters that the encoding lacks are replaced.
"""

from __future__ import annotations

import codecs
import errno
import io
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleDimensions

UNFOLDED = 10_000  # columns, where nobody's terminal is to be fitted
_REPLACEMENTS = {"Δ": "d", "↓": "v", "↑": "^", "±": "+-", "−": "-", "–": "-", "—": "-", "×": "x", "…": "...", "→": "->"}


class StreamConsole(Console):
    """Prints to stdout or stderr as they are when it prints; in a log or a pipe one line stays one line, and tables have
    their natural width unless COLUMNS is set."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(highlight=False, stderr=stderr)

    @property
    def soft_wrap(self) -> bool:
        return not self.is_terminal

    @soft_wrap.setter
    def soft_wrap(self, _: bool) -> None:
        """Rich's constructor sets it; it follows the stream."""

    @property  # type: ignore[misc]
    def size(self) -> ConsoleDimensions:
        found = super().size
        return found if self.is_terminal or "COLUMNS" in os.environ else found._replace(width=UNFOLDED)

    def print_data(self, data: Any) -> None:
        """Print JSON that every reader takes: escaped where the encoding is small, NaN and infinities as null."""
        self.print_json(data=_finite(data), ensure_ascii=not self.encoding.startswith("utf"))


def prepare() -> None:
    """Make stdout and stderr streams that can be printed to, whatever they are."""
    for number in range(3):  # a file that is opened later would get the number of a closed stream, and what it prints
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8"))
        elif type(stream) is io.TextIOWrapper:
            setattr(sys, name, _lasting(stream))


def finish() -> OSError | None:
    """Flush both streams; why stdout could not take all of it, where its reader did not just go away."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _LastingFile) else None
    return None if error is None or error.errno == errno.EPIPE else error


class _LastingFile(io.FileIO):
    """A file that takes everything; from its first error on it drops it."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return len(data)


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.reconfigure(errors="readable")
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if type(raw) is not io.FileIO:  # a Windows console
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="readable",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _readable(error: UnicodeError) -> tuple[str, int]:
    """An error handler for encoding: what stands for characters that there are none of."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_REPLACEMENTS.get(character, "?") for character in missing), error.end


codecs.register_error("readable", _readable)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def quiet_libraries() -> None:
    """Progress bars and advice of libraries would tear the live view apart; their errors still reach us."""
    import transformers

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # `datasets` itself would take half a second to import
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
