"""The CPU kernels of `native.cpp`: found in the package or the user's cache, else built there, in the best variant that the
processor runs.

`QATRUN_NATIVE` picks another variant (baseline, avx2, avx512), or none: `off` leaves all to the reference.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qatrun.errors import InputError
from qatrun.numerics import native_build

_log = logging.getLogger(__name__)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "quantize": (_I, _P, _I, _N, _N, _P, _N, _F, _F, _P, _I, _P, _P, _P, _P),
    "decode": (_P, _N, _P, _P, _I),
    "rescale": (_P, _I, _N, _N, _P, _N, _P, _N, _P),
    "scale_gradient": (_P, _I, _N, _P, _P, _P, _I),
}
_PLAIN = (Tensor, nn.Parameter)
_OFF = "off"
# torch can be held to an older instruction set; the kernels follow, so that one variable is enough for a trial.
_TORCH_VARIABLE = "ATEN_CPU_CAPABILITY"
_TORCH_VARIANTS = {"default": "baseline", "avx2": "avx2"}


class Kernels(NamedTuple):
    """The functions of one variant; arguments as in `native.cpp`."""

    variant: str
    quantize: Callable[..., None]
    decode: Callable[..., None]
    rescale: Callable[..., None]
    scale_gradient: Callable[..., None]


@cache
def kernels() -> Kernels | None:
    """The kernels, or None where there are none; then says once what that costs.

    Raises:
        InputError: QATRUN_NATIVE names a variant that does not exist or that this processor cannot run.
    """
    if os.environ.get("QATRUN_NATIVE") == _OFF:
        return None
    library = _library()
    if library is None:
        return None
    name = _chosen(library)
    functions = {}
    for function, arguments in _ARGUMENTS.items():
        found = getattr(library, f"qatrun_{function}_{name}")
        found.argtypes, found.restype = arguments, None
        functions[function] = found
    return Kernels(name, **functions)


def variant() -> str | None:
    """The instruction set of the kernels in use: avx512, avx2, or baseline (SSE2, on Arm NEON); None: the reference runs."""
    found = kernels()
    return None if found is None else found.variant


def check(name: str, tensor: Tensor | None, dtype: torch.dtype, *shapes: tuple[int, ...]) -> None:
    """What a pass over memory is told must fit, or it would run past the end of a tensor.

    Args:
        name: what the message calls it.
        tensor: None is always right.
        shapes: those that it may have.
    Raises:
        TypeError: it is of another dtype. ValueError: it has another shape.
    """
    if tensor is None or (tensor.dtype is dtype and tensor.shape in shapes):
        return
    allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
    wrong = ValueError if tensor.dtype is dtype else TypeError
    raise wrong(f"{name} must be {dtype} of shape {allowed}, got {tensor.dtype} {list(tensor.shape)}")


def address(tensor: Tensor | None) -> int | None:
    """Where the values of a contiguous tensor lie; null for None."""
    if tensor is None:
        return None
    assert is_plain(tensor)
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def is_plain(tensor: Tensor | None) -> bool:
    """Whether a tensor's values lie in this machine's memory, as its strides say; those of a subclass may lie anywhere."""
    return tensor is None or (type(tensor) in _PLAIN and tensor.device.type == "cpu" and not tensor.is_neg())


def _chosen(library: ctypes.CDLL) -> str:
    runs = [name for name in native_build.variants() if name == "baseline" or getattr(library, f"qatrun_runs_{name}")()]
    wanted = os.environ.get("QATRUN_NATIVE") or _TORCH_VARIANTS.get(os.environ.get(_TORCH_VARIABLE, ""))
    if wanted is None:
        return runs[0]
    if wanted in runs:
        return wanted
    if os.environ.get("QATRUN_NATIVE"):
        raise InputError(f"QATRUN_NATIVE={wanted}: this processor runs {', '.join(runs)}; or {_OFF}")
    return runs[-1]


@cache
def _library() -> ctypes.CDLL | None:
    for folder in (native_build.SOURCE.parent, *_cache_folders()):
        for path in native_build.whole_libraries(folder):
            with suppress(OSError):  # made for another system, say another libc
                return _loaded(path)
    command = native_build.compiler()
    if command is None or shutil.which(command[0]) is None:
        _warn(f"{command[0]} is not there" if command else "no C++ compiler found: g++, clang++ or CXX")
        return None
    try:
        return _loaded(_built(command))
    except (OSError, subprocess.CalledProcessError) as error:
        _warn(getattr(error, "stderr", "") or str(error))
        return None


def _built(command: list[str]) -> Path:
    """The library in the first folder that takes it."""
    refused = OSError("no folder to keep them in")
    for folder in _cache_folders():
        try:
            return native_build.build(command, folder)
        except OSError as error:
            refused = error
    raise refused


def _cache_folders() -> Iterator[Path]:
    """The user's cache; and, where that cannot be written, a folder for temporary files that is nobody else's."""
    home = os.path.expanduser("~/.cache")  # noqa: PTH111 -- pathlib raises where there is no home
    for folder in (os.environ.get("XDG_CACHE_HOME", ""), home):
        if Path(folder).is_absolute():
            yield Path(folder) / "qatrun"
            break
    user = os.getuid() if hasattr(os, "getuid") else 0
    private = Path(tempfile.gettempdir()) / f"qatrun-{user}"
    with suppress(OSError):
        private.mkdir(mode=0o700, exist_ok=True)
        found = private.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022:
            yield private


def _loaded(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    # The runtime that torch has loaded, so that both share one pool of threads; without it the kernels use one thread.
    for runtime in (None, *map(str, Path(torch.__file__).parent.glob("lib/lib*omp*"))):
        with suppress(OSError, AttributeError):
            openmp = ctypes.CDLL(runtime)
            functions = openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads
            library.qatrun_share_threads(*(ctypes.cast(function, _P) for function in functions))
            break
    return library


def _warn(reason: str) -> None:
    lines = reason.strip().splitlines() or ["unknown"]
    said = next((line for line in lines if "error:" in line), lines[-1])
    _log.warning("the CPU kernels cannot be built (%s): quantizing gives the same numbers, several times slower", said)
