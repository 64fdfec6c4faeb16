"""One input in a process of its own, forked from one that has imported everything, and the verdict on what it did."""

from __future__ import annotations

import faulthandler
import importlib
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ALLOWED = {0, 1, 2, 3, 4, 130}
ADDRESS_SPACE = 8 * 2**30  # bytes: a size that no machine has is refused by this one too
OURS = ("home", "tmp", "stdout", "stderr")  # beside the world: what a command may write to, and its output


@dataclass
class Run:
    """A command at work in `folder/world`.

    Attributes:
        before: file -> its state when the command began.
    """

    folder: Path
    pid: int
    limit_s: float
    before: Mapping[str, tuple[int, int]]
    began: float = field(default_factory=time.monotonic)
    too_long: bool = False

    @property
    def world(self) -> Path:
        return self.folder / "world"

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs. Ends it when its time is over."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0 and time.monotonic() - self.began > self.limit_s:
            self.too_long = True
            os.kill(self.pid, 9)
            pid, status = os.waitpid(self.pid, 0)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def said(self) -> str:
        return "".join((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))


def preload() -> None:
    """Import, once, what commands would each import for seconds, and start no thread that a fork would lose."""
    import torch

    torch.set_num_threads(1)

    for module in ("cli", "evaluate.harness", "report.page", "study.runner", "study.scoring"):
        importlib.import_module(f"qatrun.{module}")
    from qatrun.numerics import native

    native.variant()


def start(arguments: Sequence[str], folder: Path, limit_s: float) -> Run:
    """Run `qatrun ARGUMENTS` in `folder/world`, its home and temporary files beside it."""
    for name in ("home", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    before = _states(folder)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _be_the_command(arguments, folder, limit_s)
    return Run(folder, pid, limit_s, before)


def faults(run: Run, code: int, may_write: bool) -> list[str]:
    """What the command should not have done.

    Args:
        may_write: the user named another place for its output.
    """
    said, found = run.said(), []
    if run.too_long:
        where = re.search(r"qatrun/(?!cli|boundary)([\w/]+\.py)\", line (\d+)", said)
        found.append(f"still running after {run.limit_s:.0f} s" + (f" ({where[1]}:{where[2]})" if where else ""))
    elif code < 0:
        found.append(f"killed by signal {-code}")
    elif code not in ALLOWED:
        found.append(f"exit code {code}")
    if "Traceback (most recent call last)" in said:
        found.append("traceback: " + said.strip().splitlines()[-1])
    if own := re.search(r"an error of qatrun's own, not yours: (.*); (?:the traceback is|no log)", said):
        found.append(f"its own error: {own[1]}")
    if code in (2, 3) and not said.strip():
        found.append(f"exit code {code} without a word")
    if (run.folder / "canary").exists():
        found.append("ran code")
    if not may_write:
        after = _states(run.folder)
        changed = sorted(file for file in {*run.before, *after} if run.before.get(file) != after.get(file))
        found += [f"touched {file}" for file in changed if file != "canary"][:3]
    return found


def _be_the_command(arguments: Sequence[str], folder: Path, limit_s: float) -> None:
    """In the child: become the command, and never return."""
    code = 70
    try:
        for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
            opened = os.open(name if number == 0 else folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        faulthandler.dump_traceback_later(0.95 * limit_s, file=sys.stderr)
        os.chdir(folder / "world")
        os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
        tempfile.tempdir = None
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["qatrun", *arguments]
        from qatrun import cli

        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """File -> (size, time of its last change), but for studies and what is ours."""
    found = {}
    for at, names, files in os.walk(folder):
        here = Path(at).relative_to(folder)
        names[:] = [name for name in names if str(here / name) not in (*OURS, "world/runs")]
        for name in files:
            if str(here / name) not in OURS:
                state = (Path(at) / name).lstat()
                found[str(here / name)] = (state.st_size, state.st_mtime_ns)
    return found


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
