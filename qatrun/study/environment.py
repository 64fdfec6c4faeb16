"""What a study ran on: versions, hardware, the state of the code. Written beside its results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from qatrun.numerics import bfloat16_way, native
from qatrun.ranks import started
from qatrun.records.environment import StudyEnvironment

PACKAGES = ("qatrun", "torch", "transformers", "datasets", "accelerate", "lm_eval", "tokenizers", "numpy", "scipy")


def describe_environment() -> StudyEnvironment:
    """As it is now; holds no host or user names."""
    described = StudyEnvironment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
        python=platform.python_version(),
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        platform=platform.platform(),
        cpu={
            "model": _cpu_model(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "bfloat16_products": bfloat16_way(),
            "kernels": native.variant(),
        },
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        git=_git_state(),
    )
    return described.model_copy(update={"processes": started().size}) if started().size > 1 else described


def runs_on() -> str:
    """The processor that a run here uses, and how it makes bfloat16 products."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    way = "its own unit" if bfloat16_way() == "native" else "float32, rounded once: it has no unit for them"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_model()} ({capability}, {torch.get_num_threads()} threads); bfloat16 products in {way}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state() -> dict[str, Any] | None:
    """Commit of the working folder, and whether it has changes; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
