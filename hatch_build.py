"""Build hook: a wheel carries the CPU kernels where there is a C++ compiler to build them, and is a pure one where not.

The kernels are called through ctypes, so one wheel serves every Python of a platform. An editable install carries none: its
source may change, so they are built at first use.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsBuildHook(BuildHookInterface):
    """Puts `native-<digests>.so` beside `qatrun/numerics/native.cpp`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        native_build = _module(Path(self.root) / "qatrun" / "numerics" / "native_build.py")
        command = native_build.compiler()
        self._folder = tempfile.mkdtemp(prefix="qatrun-kernels-")
        try:
            if command is None:
                raise OSError("no C++ compiler found: g++, clang++ or CXX")
            library = native_build.build(command, Path(self._folder))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
            self.app.display_warning(f"this wheel carries no CPU kernels, they are built at first use: {reason}")
            return
        build_data["force_include"][str(library)] = f"qatrun/numerics/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            shutil.rmtree(self._folder, ignore_errors=True)


def _module(path: Path) -> ModuleType:
    """A module by its path: importing its package would need torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform_tag() -> str:
    """As of this interpreter; a universal one of macOS still builds for the processor at hand."""
    tag = sysconfig.get_platform().replace("universal2", platform.machine())
    return tag.replace("-", "_").replace(".", "_")
