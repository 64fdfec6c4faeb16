"""Build and load `native.cpp`: the CPU kernels. Compiled once a machine (seconds), kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
INCLUDED = SOURCE.with_name("native_avx512.hpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "qatrun_quantize": (_I, _P, _I, _N, _N, _P, _N, _F, _F, _P, _I, _P, _P, _P, _P),
    "qatrun_decode": (_P, _N, _P, _P, _I),
    "qatrun_rescale": (_P, _I, _N, _N, _P, _N, _P, _N, _P),
    "qatrun_scale_gradient": (_P, _I, _N, _P, _P, _P, _I),
}


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot be built; then says once what that costs."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        _warn("no C++ compiler found (g++, or CXX)")
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        _warn(getattr(error, "stderr", "") or str(error))
        return None
    for name, arguments in _ARGUMENTS.items():
        getattr(loaded, name).argtypes, getattr(loaded, name).restype = arguments, None
    return loaded


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's values lie; null for None."""
    return None if tensor is None else tensor.data_ptr()


def _warn(reason: str) -> None:
    lines = reason.strip().splitlines() or ["unknown"]
    said = next((line for line in lines if "error:" in line), lines[-1])
    warnings.warn(
        f"the CPU kernels cannot be built ({said}); quantized training gives the same numbers several times slower",
        stacklevel=4,
    )


def _built(compiler: str) -> Path:
    """The shared library for this source, compiler and machine; built if it is not in the cache."""
    target = subprocess.run([compiler, *FLAGS, "-Q", "--help=target"], capture_output=True, check=False).stdout
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    source = SOURCE.read_bytes() + INCLUDED.read_bytes()
    key = hashlib.sha256(source + version.encode() + target + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qatrun"
    built = folder / f"native-{key}.so"
    if not built.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = built.with_suffix(f".{os.getpid()}")
        compiled = partial.with_suffix(f".{os.getpid()}.o")
        # Linked without -fopenmp: its symbols resolve to the OpenMP runtime that torch has loaded.
        _run(compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", str(compiled))
        _run(compiler, "-shared", str(compiled), "-o", str(partial))
        compiled.unlink()
        partial.replace(built)
    return built


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)
