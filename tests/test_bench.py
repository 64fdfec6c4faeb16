"""The benchmark script runs, records what it measured, and notices a ratio that left its band."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from compilers import needs_compiler

from qatrun.numerics import native

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
