"""The benchmark script runs, records what it measured, and notices a ratio that left its band."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from compilers import needs_compiler

from qatrun.numerics import native
from qatrun.quant import Mode

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench.py"


@needs_compiler
def test_kernel_benchmark_records_and_checks(tmp_path: Path) -> None:
    kind = f"cpu-{native.variant() or 'reference'}"
    impossible = {f"kernel/{case} MiB/hif8": [0.0, 0.0] for case in ("fp32 0.0156", "bf16 0.00781")}
    (tmp_path / f"{kind}-bands.json").write_text(json.dumps(impossible))
    output = tmp_path / "output"
    arguments = ("kernel", "--quick", "--values", "4096", "--output", str(output), "--check", str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1, ran.stderr
    complaints = [line for line in ran.stdout.splitlines() if "recorded band 0.000 .. 0.000" in line]
    assert len(complaints) == len(impossible)

    recorded = json.loads((output / f"{kind}.json").read_text())["kernel"]
    assert {"packages", "cpu", "git", "date"} <= recorded["environment"].keys()
    measured = {(row["case"], row["arm"]): row for row in recorded["rows"]}
    for case in ("fp32 0.0156 MiB", "bf16 0.00781 MiB"):
        assert {"hif8+mask", "fp8_e4m3", "int8"} <= {arm for of, arm in measured if of == case}
        row = measured[case, "hif8"]
        assert row["n"] == 10
        assert 0 < row["low"] <= row["value"] <= row["high"]
        assert measured[case, row["reference"]]["value"] == 1.0
        low, high = json.loads((output / f"{kind}-bands.json").read_text())[f"kernel/{case}/hif8"]
        assert low < row["value"] < high
    assert "not measured" in (output / f"{kind}.md").read_text()


class NoProgress:
    def begin(self, case: str, rounds: int) -> None: ...
    def advance(self) -> None: ...


def test_what_is_timed_is_the_step_of_the_training_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    arms, memory, timing, watching = (
        import_module(f"benchmarks.{name}") for name in ("arms", "memory", "timing", "watching")
    )
    made = arms.trainee("hif8", arms.SHAPES["tiny"], "cpu", bf16=True, micro_batches=2)
    quant = made.stepper.quant
    assert (quant.mode, quant.scales.num_pushes) == (Mode.QUANTIZE, 2)
    first, later = made.step(), [made.step() for _ in range(20)][-1]
    assert later < first
    assert quant.scales.num_pushes == 23
    saved = {
        arm: memory.saved_for_backward(arms.trainee(arm, arms.SHAPES["tiny"], "cpu", bf16=True))
        for arm in (arms.UNQUANTIZED, "hif8", "hif8_codes")
    }
    assert saved["hif8_codes"] < saved["hif8"]
    rows = watching.benchmark(timing.Settings("cpu", "tiny", quick=True), NoProgress())
    assert [row.case for row in rows] == ["fp32", "bf16"]


def test_what_torch_compiles_is_kept_apart_by_instruction_set(tmp_path: Path) -> None:
    where = "import bench; from torch._inductor.runtime import cache_dir_utils; print(cache_dir_utils.cache_dir())"
    folders = set()
    for held_to in ("default", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": held_to, "TMPDIR": str(tmp_path)}
        del environment["TORCHINDUCTOR_CACHE_DIR"]  # the tests' own
        command = [sys.executable, "-c", where]
        ran = subprocess.run(command, cwd=SCRIPT.parent, env=environment, capture_output=True, text=True, check=True)
        folders.add(ran.stdout.strip())
    assert folders == {str(tmp_path / f"qatrun-inductor-{held_to}-{os.getuid()}") for held_to in ("default", "avx2")}
