"""The fuzz script: a short run of it ends well, and it notices what it is there to notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from fuzzing.run import Run, _states, faults  # noqa: E402


def test_a_short_run_ends_well() -> None:
    command = [sys.executable, str(SCRIPTS / "fuzz.py"), "--inputs", "24", "--seed", "10", "--limit", "120"]
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    assert ran.stdout.splitlines()[-1] == "0 ended badly"


def a_run(folder: Path, said: str = "a sentence") -> Run:
    (folder / "world/runs/tiny").mkdir(parents=True)
    (folder / "world/tiny.yaml").write_text("name: tiny")
    (folder / "stdout").write_text("")
    (folder / "stderr").write_text(said)
    return Run(folder, pid=0, limit_s=60.0, before=_states(folder))


@pytest.mark.parametrize(
    ("code", "said", "found"),
    [
        (2, "a sentence", []),
        (2, "", ["exit code 2 without a word"]),
        (5, "a sentence", ["exit code 5"]),
        (-11, "", ["killed by signal 11"]),
        (3, "Traceback (most recent call last):\nValueError: x", ["traceback: ValueError: x"]),
        (
            3,
            "an error of qatrun's own, not yours: KeyError: 1 (x.py:3); the traceback is in y",
            ["its own error: KeyError: 1 (x.py:3)"],
        ),
    ],
)
def test_a_bad_end_is_named(tmp_path: Path, code: int, said: str, found: list[str]) -> None:
    assert faults(a_run(tmp_path, said), code, may_write=False) == found


def test_code_that_ran_and_files_that_were_touched_are_named(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    (tmp_path / "world/runs/tiny/result.json").write_text("{}")
    assert faults(run, 0, may_write=False) == []
    (tmp_path / "world/tiny.yaml").write_text("name: changed")
    (tmp_path / "escape").touch()
    (tmp_path / "canary").touch()
    assert faults(run, 0, may_write=False) == ["ran code", "touched escape", "touched world/tiny.yaml"]
    assert faults(run, 0, may_write=True) == ["ran code"]
