"""Every verb in a world of several processes: the first prints and writes, and all end with its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from studies import checksums, outcome, read
from tiny_world import run_qatrun, write_world
from worlds import Worlds, cli, cli_in_world

from qatrun.train.stepper import Stepper

PROBE = ("--set", "monitor.probe.items=4", "--set", "monitor.probe.every=6")  # a benchmark of the model in parts
SHORT = ("--set", "train.steps=12", "--set", "warmup.steps=4", "--set", "eval.limit=20", *PROBE)


def of_the_run(study: Path) -> dict[str, object]:
    """`outcome` but for checkpoints, which lie in other files, and what only the clock changes."""
    kept = outcome(study)
    for arm in ("bf16", "hif8"):
        files = kept[arm]["files"]
        kept[arm]["files"] = {name: digest for name, digest in files.items() if "checkpoints" not in name}
        assert {"model.safetensors", "tensors/step-000004.parquet"} & files.keys()
    return kept


def launched(launcher: str, *arguments: str, cwd: Path) -> str:
    """What a real launcher's processes print, that starts `qatrun ARGUMENTS` after options of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", launcher, *arguments]
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a study that two processes of torchrun made, and the same by one, under `alone`."""
    folder = tmp_path_factory.mktemp("two")
    write_world(folder)
    assert run_qatrun("train", "tiny.yaml", *SHORT, "--set", "output_dir=alone", cwd=folder).code == 0
    options = ("--standalone", "--nproc_per_node=2", f"--log-dir={folder / 'logs'}", "--redirects=3", "-m", "qatrun")
    launched("torch.distributed.run", *options, "train", "tiny.yaml", *SHORT, cwd=folder)
    return folder


def test_a_study_of_two_processes_is_that_of_one(two: Path) -> None:
    assert of_the_run(two / "runs/tiny") == of_the_run(two / "alone/tiny")
    one, other = (read(two / folder / "tiny/diagnosis.json") for folder in ("runs", "alone"))
    assert one == other


def test_the_first_process_alone_prints(two: Path) -> None:
    logs = two.glob("logs/*/*/*/std*.log")
    printed = {file.parent.name + file.stem: file.read_text() for file in logs}
    assert sorted(printed) == ["0stderr", "0stdout", "1stderr", "1stdout"]
    first, second = (printed[f"{rank}stdout"] for rank in (0, 1))
    assert first.count("the page: ") == 1
    assert first.count("verdict: ") == 1
    assert second == ""


def test_a_study_says_how_many_processes_began_it(two: Path) -> None:
    assert read(two / "runs/tiny/environment.json")["processes"] == 2
    assert "processes" not in read(two / "alone/tiny/environment.json")


def test_eval_writes_once_what_one_process_would(two: Path, tmp_path: Path) -> None:
    arguments = ("eval", str(two / "runs/tiny/hif8"), "--batch-size", "3", "--output")
    options = ("--multi_gpu", "--num_processes=2", "--main_process_port=0", "-m", "qatrun")  # GPUs or not
    printed = launched("accelerate.commands.launch", *options, *arguments, str(tmp_path / "two"), cwd=two)
    assert run_qatrun(*arguments, str(tmp_path / "one"), cwd=two).code == 0
    one, other = checksums(tmp_path / "one"), checksums(tmp_path / "two")
    differ = {"lm_eval_results.json", "scored.json"}  # the time, the place
    assert one.keys() == other.keys() > differ
    assert {name for name in one if one[name] != other[name]} <= differ
    scored, again = ({**read(tmp_path / name / "scored.json"), "output": ""} for name in ("one", "two"))
    assert scored == again
    assert printed.count("quantizers on, scales frozen") == 1


@pytest.mark.parametrize(
    ("verb", "shown"),
    [
        (("report", "tiny"), "wrote "),
        (("compare", "bf16", "hif8"), "comparing bf16 and hif8"),
        (("recipes",), "openpangu-1b-hif8"),
        (("check", "tiny.yaml"), "tiny: model"),
        (("--version",), "qatrun "),
    ],
    ids=lambda verb: verb[0] if isinstance(verb, tuple) else "",
)
def test_a_verb_that_is_not_shared_runs_once(two: Path, verb: tuple[str, ...], shown: str) -> None:
    run = cli_in_world(2, *verb, cwd=two)
    assert run.codes() == [0, 0], run.log()
    assert run.log(0).count(shown) == 1
    assert run.log(1) == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("train", "tiny.yaml", "--set", "name=odd", "--set", "train.global_batch_size=12"),
            "12 sequences are no whole number of micro-batches of 4 for each of 2 processes; 8 or 16 would be,",
        ),
        (("train", "tiny.yaml", "--set", "name=odd", "--processes", "3"), "--processes 3: 2 were started already"),
        (("eval", "nothing-there"), "nothing-there"),
        (("train",), "Missing argument"),
    ],
    ids=["batches", "processes", "no model", "usage"],
)
def test_what_is_refused_is_said_once_and_nothing_is_written(two: Path, arguments: tuple[str, ...], said: str) -> None:
    before = checksums(two)
    run = cli_in_world(2, *arguments, cwd=two)
    assert run.codes() == [2, 2]
    assert run.log(0).count(said) == 1
    assert run.log(1) == ""
    assert checksums(two) == before


def test_accelerate_that_dropped_the_processes_is_not_taken_for_one(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    ran = run_qatrun("recipes", cwd=two)
    assert ran.code == 2
    assert "accelerate launch starts one process with --cpu" in ran.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = run_qatrun("recipes", cwd=two)
    assert (ran.code, ran.err) == (2, "WORLD_SIZE is 2, but MASTER_ADDR, RANK is not set: start it with torchrun\n")


def test_a_killed_process_ends_the_run_and_is_named(two: Path) -> None:
    run = cli_in_world(2, "train", "tiny.yaml", *SHORT, "--set", "name=killed", cwd=two)
    run.wait_for(lambda: "training hif8 step 9" in run.log(0))
    run.kill(1)
    assert run.codes() == [3, -signal.SIGKILL]
    assert "process 1 of 2 has ended" in run.log(0)


def test_a_process_that_hangs_ends_the_run_in_time_and_is_named(two: Path) -> None:
    run = cli_in_world(2, "train", "tiny.yaml", *SHORT, "--set", "name=hanging", cwd=two, QATRUN_TIMEOUT="20")
    run.wait_for(lambda: "training bf16 step 6" in run.log(0))
    run.kill(1, signal.SIGSTOP)
    run.wait_for(lambda: not run.processes[0].is_alive())
    run.kill(1)
    assert run.codes() == [3, -signal.SIGKILL]
    assert "process 1 of 2 does not answer" in run.log(0)


def out_of_memory(arguments: list[str], cwd: str) -> None:
    """The second process has too little of it."""

    def step(self: Stepper, *given: Any) -> Any:
        if self.world.rank == 1 and self.num_steps == 5:
            raise MemoryError("7 GiB")
        return original(self, *given)

    original, Stepper.step = Stepper.step, step
    cli(arguments, cwd)


def test_a_process_whose_memory_runs_out_says_so(two: Path) -> None:
    run = Worlds(2, out_of_memory, ["train", "tiny.yaml", *SHORT, "--set", "name=full"], str(two))
    assert run.codes() == [3, 3], run.log()
    assert "process 1 of 2: memory ran out (7 GiB)" in run.log(1)
    assert "process 1 of 2 has ended" in run.log(0)


def test_signals_to_all_save_and_end_in_order(two: Path) -> None:
    run = cli_in_world(2, "train", "tiny.yaml", *SHORT, "--set", "name=stopped", cwd=two)
    run.wait_for(lambda: "training bf16 step 6" in run.log(0))
    for rank in (1, 0, 1, 0):
        run.kill(rank, signal.SIGTERM)
    assert run.codes() == [3, 3], run.log()
    assert "; saved" in run.log(0)
    assert run_qatrun("train", "tiny.yaml", *SHORT, "--set", "name=stopped", "--resume", cwd=two).code == 0
    assert of_the_run(two / "runs/stopped") == of_the_run(two / "runs/tiny")


def test_processes_are_started_and_their_exit_code_is_ours(two: Path) -> None:
    command = [sys.executable, "-m", "qatrun", "eval", "nothing-there", "--processes", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, cwd=two, env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("nothing-there") == 1
