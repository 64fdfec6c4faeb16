"""What must run in a fresh process, because it measures the process: `python -m benchmarks.worker peak|startup '{...}'`.

The answer is JSON on the last line of stdout.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.arms import Shape, build_model, trainee, untrained


def in_new_process(
    measurement: str, environment: Mapping[str, str] | None = None, **arguments: Any
) -> dict[str, float]:
    """Run a measurement of this module in a process of its own.

    Raises:
        RuntimeError: it failed; the message ends with its last output.
    """
    if isinstance(arguments.get("shape"), Shape):
        arguments["shape"] = asdict(arguments["shape"])
    command = [sys.executable, "-m", "benchmarks.worker", measurement, json.dumps(arguments)]
    scripts = str(Path(__file__).resolve().parents[1])
    ran = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": scripts, **(environment or {})}, capture_output=True, text=True
    )
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr[-2000:]}")
    answer: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return answer


def peak(arm: str, shape: Shape, device: str, bf16: bool, checkpointing: bool, micro_batches: int) -> dict[str, float]:
    """Most memory in use during a step, of the model and all it needs, without that of the interpreter before it."""
    from qatrun.train.memory import peak_memory_bytes, reset_peak_memory

    reset_peak_memory()
    before = peak_memory_bytes()
    made = trainee(arm, shape, device, bf16=bf16, checkpointing=checkpointing, micro_batches=micro_batches)
    reset_peak_memory()
    for _ in range(2):
        made.step()
    return {"bytes": peak_memory_bytes() - before}


def startup(arm: str, shape: Shape, device: str, bf16: bool) -> dict[str, float]:
    """Seconds that attaching quantizers and the first step take beyond what a later step takes."""
    model = build_model(shape, device)
    began = time.perf_counter()
    made = untrained(arm, model, shape, device, bf16=bf16)
    float(made.step())
    first = time.perf_counter() - began
    later = []
    for _ in range(4):
        began = time.perf_counter()
        float(made.step())
        later.append(time.perf_counter() - began)
    return {"extra_s": first - statistics.median(later)}


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    given["shape"] = Shape(**given["shape"])
    print(json.dumps(peak(**given) if sys.argv[1] == "peak" else startup(**given)))
