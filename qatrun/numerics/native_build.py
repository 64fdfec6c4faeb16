"""Compile `native.cpp` into one shared library that carries the kernels for every instruction set of the architecture.

The library needs neither Python nor torch to be built, so it is made once: for a wheel (`hatch_build.py`, which loads this
module by its path: it imports the standard library alone), or on the user's machine where none came along. Its name holds a
digest of what it was made from and one of its own bytes, so whoever finds it can tell whether it is the right one and whole.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fwrapv",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fopenmp-simd",
)
_DIGITS = 32
# Best first; the last one is what every processor of the architecture runs.
X86_64: dict[str, tuple[str, ...]] = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2",),
    "baseline": ("-DQATRUN_COMMON",),
}
ELSEWHERE: dict[str, tuple[str, ...]] = {"baseline": ("-DQATRUN_COMMON",)}  # on Arm that is NEON


def variants() -> dict[str, tuple[str, ...]]:
    """Name and flags of what is built on this machine."""
    return X86_64 if platform.machine().lower() in ("x86_64", "amd64") else ELSEWHERE


def compiler() -> list[str] | None:
    """The command of the C++ compiler, `CXX` before others; None where there is none."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    found = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    return chosen or ([found] if found else None)


def build(command: list[str], folder: Path) -> Path:
    """The library, built into a folder, whole or not at all; processes that build it at the same time do no harm.

    Raises:
        OSError: the folder cannot be written, or the compiler cannot be run.
        subprocess.CalledProcessError: it failed; `stderr` says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as work:
        objects = {name: str(Path(work) / f"{name}.o") for name in variants()}
        running = [
            _start(*command, *FLAGS, *flags, f"-DQATRUN_VARIANT={name}", "-c", str(SOURCE), "-o", objects[name])
            for name, flags in variants().items()
        ]
        library = Path(work) / "native.so"
        _finish(*running)
        _finish(_start(*command, "-shared", *objects.values(), "-o", str(library)))
        with library.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.sha256(file.read()).hexdigest()
        return library.replace(folder / f"native-{_made_from()}-{digest[:_DIGITS]}.so")


def whole_libraries(folder: Path) -> Iterator[Path]:
    """The libraries in a folder that were made from this very source and are as they were when built."""
    for path in sorted(folder.glob(f"native-{_made_from()}-*.so")):
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            continue
        if path.stem.endswith(f"-{digest[:_DIGITS]}"):
            yield path


def _made_from() -> str:
    recipe = repr((FLAGS, variants(), sys.platform, platform.machine()))
    return hashlib.sha256(SOURCE.read_bytes() + recipe.encode()).hexdigest()[:16]


def _start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(*started: subprocess.Popen[str]) -> None:
    """Waits for all of them, so that none still writes when the first error is raised."""
    ended = [(process, process.communicate()[1]) for process in started]
    for process, errors in ended:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)
