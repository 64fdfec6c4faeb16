"""Starting: `qatrun --help`, and what the first step costs beyond a later one, with no compiled code at hand and with that
of an earlier run."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.arms import SHAPES, UNQUANTIZED, resized
from benchmarks.timing import Progress, Row, Settings
from benchmarks.worker import in_new_process


def benchmark(settings: Settings, progress: Progress) -> list[Row]:
    """Seconds beyond a later step's, each start a process of its own; a small model, since compiled code is the same."""
    rounds = 1 if settings.quick else 3
    shape = resized(SHAPES[settings.model], layers=2)
    seconds: dict[tuple[str, str], list[float]] = {}
    progress.begin("startup", rounds)
    for _ in range(rounds):
        for arm in (UNQUANTIZED, "hif8"):
            with tempfile.TemporaryDirectory() as cache:
                environment = {"XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "inductor")}
                for start in ("first start", "second start"):
                    measured = in_new_process(
                        "startup", environment, arm=arm, shape=shape, device=settings.device, bf16=True
                    )
                    seconds.setdefault((start, arm), []).append(measured["extra_s"])
        seconds.setdefault(("qatrun --help", "beyond Python's own start"), []).append(_help_seconds())
        progress.advance()
    rows = []
    for (start, arm), extra in seconds.items():
        low, middle, high = (float(value) for value in np.quantile(extra, [0.25, 0.5, 0.75]))
        rows.append(Row("startup", start, arm, middle, low, high, rounds, unit="s"))
    return rows


def _help_seconds() -> float:
    def seconds(*arguments: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - began

    return seconds("-c", "from qatrun.cli import main; main()", "--help") - seconds("-c", "pass")
