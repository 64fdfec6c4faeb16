"""Where every error ends: in a sentence and an exit code, never in a traceback.

what qatrun raises on purpose    its own sentences             2, or 3
what the system refuses          the path and why              2 for a path that is wrong, 3 for what the machine lacks
memory, the network              what ran out or was not there 3
Ctrl-C, SIGTERM                  what is saved                 3 with a study to resume, else 130
anything else                    it is ours; where the log is  3
"""

from __future__ import annotations

import errno
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from qatrun.errors import Interrupted, QatrunError, SourceError
from qatrun.layout import RECIPE_FILE

INTERRUPTED = 130
_INPUT, _RUN = 2, 3
_WRONG_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
}
_NETWORK = {"aiohttp", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3"}
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_PACKAGE = Path(__file__).parent
_SHOWN = 400  # characters of another library's message

_study: ContextVar[Path | None] = ContextVar("study", default=None)
_again: ContextVar[str] = ContextVar("again", default="--resume")


def working_in(study: Path, again: str = "--resume") -> None:
    """Say which study's folder the command works in: what is saved there is safe, and a log may lie there.

    Args:
        again: by which one goes on.
    """
    _study.set(study)
    _again.set(again)


def exit_code_of(command: Callable[[], Any], say: Callable[[str], None]) -> int:
    """Run a command line; what goes wrong is said in a sentence.

    Args:
        command: Typer's app with `standalone_mode=False`: returns an exit code or None.
    """
    _study.set(None)
    try:
        with _terminated_as_interrupted():
            code = command()
    except BaseException as error:
        sentence, code = _verdict(error)
        if sentence:
            say(sentence)
        return code
    if code == INTERRUPTED:  # what Typer makes of KeyboardInterrupt
        sentence, code = _interrupted()
        say(sentence)
    return code if isinstance(code, int) else 0


def os_error_sentence(error: OSError) -> tuple[str, int]:
    """What the system refused, and the exit code of that."""
    text = error.strerror if error.errno is not None and error.strerror else str(error) or type(error).__name__
    named = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes, Path))]
    where = " -> ".join(named) or (str(_study.get()) if _study.get() else "")
    code = _INPUT if error.errno in _WRONG_PATH else _RUN
    return f"{where}: {_short(text)}" if where else _short(text), code


def _verdict(error: BaseException) -> tuple[str, int]:
    """The sentence for an error, and the exit code."""
    if isinstance(error, SystemExit):  # Typer's for a broken pipe
        return "", _RUN if error.code else 0
    if isinstance(error, KeyboardInterrupt):
        return _interrupted()
    if isinstance(error, _UsageError):
        usage: Any = error
        usage.show()
        return "", usage.exit_code
    if isinstance(error, typer.Abort) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, SourceError):
        return f"{error}{_kept()}", error.exit_code
    if isinstance(error, Interrupted) and _study_to_resume():
        return f"{error}: go on with {_again.get()}", error.exit_code
    if isinstance(error, QatrunError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return os_error_sentence(error)
    text = str(error)
    if found := re.search(r"\(os error (\d+)\)", text):  # Rust's, of safetensors and tokenizers
        number = int(found[1])
        return os_error_sentence(OSError(number, os.strerror(number)))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text:
        return f"memory ran out ({_short(text)}): fewer or shorter sequences at once need less{_kept()}", _RUN
    if type(error).__module__.partition(".")[0] in _NETWORK:
        return f"the network or the hub: {_short(text)}{_kept()}", _RUN
    what = f"{type(error).__name__}: {_short(text)} ({_place(error)})"
    log = _write_log(error)
    where = f"the traceback is in {log}" if log else "no log of it could be written"
    return f"an error of qatrun's own, not yours: {what}; {where}; please report it{_kept()}", _RUN


def _interrupted() -> tuple[str, int]:
    if study := _study_to_resume():
        return f"interrupted: what is saved in {study} is kept; go on with {_again.get()}", _RUN
    return "interrupted", INTERRUPTED


def _kept() -> str:
    study = _study_to_resume()
    return f"; what is saved in {study} is safe: {_again.get()} goes on" if study else ""


def _study_to_resume() -> Path | None:
    study = _study.get()
    return study if study is not None and (study / RECIPE_FILE).is_file() else None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."


def _place(error: BaseException) -> str:
    """The innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(_PACKAGE) and f.filename != __file__]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _write_log(error: BaseException) -> Path | None:
    """Write the traceback where only the user reads it: in the study, else the user's folder for states, else the
    system's for temporary files; None where none of them takes it."""
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    about = f"{when} Python {platform.python_version()} {platform.platform()}\n{sys.argv}\n"
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111 -- never raises
    for folder in filter(None, (_study_to_resume(), Path(state, "qatrun"), Path(tempfile.gettempdir()))):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            number, name = tempfile.mkstemp(prefix="qatrun-error-", suffix=".log", dir=folder)
            with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(about + "".join(traceback.format_exception(error)))
            return Path(name)
    return None


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: files are closed, the terminal is put back, and what is saved is said."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
