"""Every error ends in a sentence and an exit code that means something; streams of any kind end no command."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import signal
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_world import run_qatrun

from qatrun import boundary, terminal
from qatrun.errors import InputError, Interrupted, RunError, SourceError


class OutOfMemoryError(RuntimeError):
    """As torch's."""


def raising(error: BaseException) -> Callable[[], Any]:
    def command() -> None:
        raise error

    return command


def ended(command: Callable[[], Any]) -> tuple[int, str]:
    said: list[str] = []
    code = boundary.exit_code_of(command, said.append)
    return code, "\n".join(said)


def os_error(name: str, path: str | None = "x/y") -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), path) if path else OSError(number, os.strerror(number))


ENDS = {
    "fine": (lambda: None, 0, ""),
    "verdict": (lambda: 1, 1, ""),
    "input": (raising(InputError("a mistake")), 2, "a mistake"),
    "run": (raising(RunError("stopped")), 3, "stopped"),
    "data": (raising(SourceError("x broke off")), 3, "x broke off"),
    "saved": (raising(Interrupted("saved at step 3")), 3, "saved at step 3"),
    "permission": (raising(os_error("EACCES")), 2, "x/y: Permission denied"),
    "read-only": (raising(os_error("EROFS")), 2, "x/y: Read-only file system"),
    "folder": (raising(os_error("EISDIR")), 2, "x/y: Is a directory"),
    "long": (raising(os_error("ENAMETOOLONG")), 2, "x/y: File name too long"),
    "links": (raising(os_error("ELOOP")), 2, "x/y: Too many levels of symbolic links"),
    "full": (raising(os_error("ENOSPC")), 3, "x/y: No space left on device"),
    "full, nameless": (raising(os_error("ENOSPC", None)), 3, "No space left on device"),
    "of Rust": (raising(RuntimeError("I/O error: (os error 28)")), 3, "No space left on device"),
    "without a number": (raising(OSError("no such\n  model")), 3, "no such model"),
    "broken pipe": (raising(SystemExit(1)), 3, ""),
    "memory": (raising(MemoryError()), 3, "memory ran out (): fewer or shorter sequences at once need less"),
    "GPU memory": (
        raising(OutOfMemoryError("CUDA out of memory")),
        3,
        "memory ran out (CUDA out of memory): fewer or shorter sequences at once need less",
    ),
    "usage": (raising(typer.BadParameter("no")), 2, ""),
    "Ctrl-C": (raising(KeyboardInterrupt()), 130, "interrupted"),
    "Ctrl-C, by Typer": (lambda: 130, 130, "interrupted"),
    "SIGTERM": (
        lambda: signal.raise_signal(signal.SIGTERM),
        130,
        "interrupted",
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_an_end_has_a_sentence_and_a_code(case: str) -> None:
    command, code, sentence = ENDS[case]
    assert ended(command) == (code, sentence)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_study_that_is_there_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()

    def at_work(error: BaseException) -> Callable[[], Any]:
        def command() -> None:
            boundary.working_in(tmp_path)
            raise error

        return command

    kept = f"what is saved in {tmp_path} is"
    assert ended(at_work(KeyboardInterrupt())) == (3, f"interrupted: {kept} kept; go on with --resume")
    assert ended(at_work(SourceError("x broke off"))) == (3, f"x broke off; {kept} safe: --resume goes on")
    assert ended(at_work(os_error("ENOSPC", None))) == (3, f"{tmp_path}: No space left on device")
    code, sentence = ended(at_work(ValueError("odd\nthing")))
    (log,) = tmp_path.glob("qatrun-error-*.log")
    assert code == 3
    assert sentence.startswith("an error of qatrun's own, not yours: ValueError: odd thing (test_boundary.py:")
    assert sentence.endswith(f"; the traceback is in {log}; please report it; {kept} safe: --resume goes on")
    assert "ValueError: odd\nthing" in log.read_text(encoding="utf-8")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_the_log_goes_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for state, temporary in (("state", "tmp"), ("file", "tmp"), ("file", "file")):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / state))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / temporary))
        code, sentence = ended(raising(ValueError("odd \ud800")))
        assert code == 3
        assert len(sentence.splitlines()) == 1
        expected = {("state", "tmp"): "state/qatrun", ("file", "tmp"): "tmp"}.get((state, temporary))
        assert len(list((tmp_path / expected).glob("*.log"))) == 1 if expected else "no log of it could" in sentence


# Streams


def qatrun(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = f'exec "{sys.executable}" -m qatrun.cli "$@" {shell}'
    variables = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "PYTHONUTF8")}
    return subprocess.run(
        ["bash", "-c", command, "bash", *arguments], env=variables | environment, capture_output=True, check=False
    )


def test_a_reader_that_stops_reading_changes_no_exit_code(tmp_path: Path) -> None:
    piped = qatrun("check", "--schema", shell="| head -1; exit ${PIPESTATUS[0]}")
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, b"{\n", b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_closed_stream_is_none_that_fails(closed: str) -> None:
    ran = qatrun("recipes", shell=closed)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert bool(ran.stdout) == (">&- " not in f"{closed.removeprefix('2')} " or closed == "2>&-")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_nothing_takes_is_said() -> None:
    ran = qatrun("recipes", shell="> /dev/full")
    assert (ran.returncode, ran.stderr) == (3, b"the output could not be written: No space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_small_encoding_prints_replacements(trained_world: Path, encoding: str) -> None:
    study = ("--study", "tiny", "--output-dir", str(trained_world / "runs"))
    ran = qatrun("compare", "bf16", "hif8", *study, LC_ALL="C", PYTHONIOENCODING=encoding)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"|dll|" in ran.stdout
    assert b"^" in ran.stdout
    data = qatrun("compare", "bf16", "hif8", *study, "--json", PYTHONIOENCODING=encoding)
    assert json.loads(data.stdout)["arm"] == "hif8"


def test_json_is_valid_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.StreamConsole().print_data({"a": [float("nan"), float("inf"), 1.5], "ü": "模"})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "ü": "模"}


@pytest.mark.parametrize("width", [60, 40])
def test_a_comparison_on_a_narrow_terminal(trained_world: Path, width: int) -> None:
    study = ("--study", "tiny", "--output-dir", str(trained_world / "runs"))
    wide = qatrun("compare", "bf16", "hif8", *study)
    narrow = qatrun("compare", "bf16", "hif8", *study, COLUMNS=str(width), TTY_COMPATIBLE="1")
    assert narrow.returncode == 0
    shown = narrow.stdout.decode()
    pair = json.loads((trained_world / "runs/tiny/comparison.json").read_text(encoding="utf-8"))["pairs"][0]
    for task in pair["comparison"]["tasks"]:
        low, high = task["ci95_pp"]
        for number in (f"{task['drop_pp']:+.2f}", f"{low:+.2f} .. {high:+.2f}", f"{100 * task['twin']:.2f}"):
            assert number in shown
            assert number in wide.stdout.decode()


def test_a_terminal_of_its_own_width(trained_world: Path) -> None:
    """Through a pseudo-terminal of 40 columns, where Rich asks the terminal itself."""
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 40, 0, 0))
        command = [sys.executable, "-m", "qatrun.cli", "check", "tiny.yaml"]
        variables = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | {"TERM": "xterm"}
        ran = subprocess.run(command, cwd=trained_world, stdout=theirs, stdin=theirs, env=variables, check=False)
        text = os.read(ours, 65536).decode()
    finally:
        os.close(ours), os.close(theirs)
    assert ran.returncode == 0
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in text.splitlines()]
    assert max(map(len, lines)) <= 40
    assert "21,824" in " ".join(lines).split()


def test_a_place_for_scores_that_cannot_be_is_known_before_they_are_made(world: Path) -> None:
    (world / "runs/tiny/hif8/quantized/model.safetensors").unlink()
    ran = run_qatrun("eval", "runs/tiny/hif8", "--tasks", "likes.yaml", "--output", "tiny.yaml/x", cwd=world)
    assert (ran.code, ran.err) == (2, "tiny.yaml/x: Not a directory\n")
