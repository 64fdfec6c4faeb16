"""Runs that are stopped, crash or are killed, and resumed: they end bit-identical to one that was not."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from training import Recorder, TinyStudy, ctrl_c, differences, final_state, gpt2_with_dropout

from qatrun.data import documents
from qatrun.errors import Interrupted, SourceError
from qatrun.train import savepoint
from qatrun.train.checkpoint import write_checkpoint
from qatrun.train.metrics import read_metrics

STEPS = 7


pytestmark = pytest.mark.usefixtures("datasets_cache", "one_thread")


CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16 autocast, gradients quantized": {
        "model": {"compute_dtype": "bfloat16"},
        "qat": {"format": "hif8", "grad_output": {}, "scaling": {"window": 3}},
    },
    "bf16 weights": {"model": {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}},
    "microbatch unit": {"qat": {"scaling": {"window": 5, "unit": "microbatch"}}},
    "most recent, every second step": {
        "qat": {"scaling": {"window": 4, "algorithm": "most_recent", "update_interval": 2}}
    },
    "dynamic": {"qat": {"format": "int8", "scaling": {"type": "dynamic"}}},
    "asymmetric": {"qat": {"format": "int8", "input": {"symmetric": False}, "scaling": {"window": 2}}},
    "late switch": {"qat": {"start_step": 5, "scaling": {"window": 2}}},
    "no warmup": {"warmup": {"steps": 0}},
    "gradient checkpointing": {"train": {"gradient_checkpointing": True}},
    "dropout": {"make_model": gpt2_with_dropout},
    "dropout, gradient checkpointing": {
        "make_model": gpt2_with_dropout,
        "train": {"gradient_checkpointing": True, "micro_batch_size": 1},
    },
    "streaming": {"streaming": True},
}


def study_in(folder: Path, *, streaming: bool = False, **sections: Any) -> TinyStudy:
    text = folder.parent / "texts.jsonl"
    train = {"path": str(text), "streaming": streaming}
    return TinyStudy(folder, data={"train": train}, **sections)


def train_stopping_after_every_step(study: TinyStudy, arm: str = "hif8") -> int:
    """Ctrl-C in every step, and resume until done; returns how often it was interrupted."""
    stops = 0
    while True:
        try:
            study.train_arm(arm, lambda: Recorder(dict.fromkeys(range(1, STEPS + 1), ctrl_c)))
        except Interrupted:
            stops += 1
        else:
            return stops


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_after_every_step_ends_bit_identical(tmp_path: Path, case: str) -> None:
    uninterrupted = study_in(tmp_path / "a", **CASES[case])
    uninterrupted.train_arm()
    stopped = study_in(tmp_path / "b", **CASES[case])
    stops = train_stopping_after_every_step(stopped)
    assert stops == STEPS
    expected, found = (final_state(study.arms["hif8"].own) for study in (uninterrupted, stopped))
    assert differences(expected, found) == []
    assert [row["step"] for row in found["metrics"]] == list(range(1, STEPS + 1))
    assert any(name == "quant/history" for name in found["tensors"])


@pytest.mark.parametrize("step", [2, 4, 6, 7])
def test_a_signal_while_a_checkpoint_is_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """It is met after the next step, or, at the end of a segment, before anything else."""
    uninterrupted, stopped = (TinyStudy(tmp_path / name) for name in "ab")
    uninterrupted.train_arm()

    def write_and_stop(folder: Path, checkpoint: Any, *settings: Any) -> Path:
        written = write_checkpoint(folder, checkpoint, *settings)
        if checkpoint.step == step:
            signal.raise_signal(signal.SIGTERM)
        return written

    with monkeypatch.context() as patch:
        patch.setattr(savepoint, "write_checkpoint", write_and_stop)
        with pytest.raises(Interrupted, match=rf"SIGTERM at step {min(step + 1, STEPS)} of \S+; saved"):
            stopped.train_arm()
    stopped.train_arm()
    expected, found = (final_state(study.arms["hif8"].own) for study in (uninterrupted, stopped))
    assert differences(expected, found) == []


@pytest.mark.parametrize("crash_step", range(1, STEPS + 1))
def test_a_run_that_crashed_in_any_step_ends_bit_identical(tmp_path: Path, crash_step: int) -> None:
    """Nothing is saved at the crash: the run goes back to the last checkpoint and metrics.jsonl is cut back to it."""

    def crash() -> None:
        raise RuntimeError("power cut")

    uninterrupted, crashed = (TinyStudy(tmp_path / name) for name in "ab")
    uninterrupted.train_arm()
    with pytest.raises(RuntimeError, match="power cut"):
        crashed.train_arm(make_listener=lambda: Recorder({crash_step: crash}))
    crashed.train_arm()
    expected, found = (final_state(study.arms["hif8"].own) for study in (uninterrupted, crashed))
    assert differences(expected, found) == []


@pytest.mark.parametrize("read", range(2, 12, 3))
def test_a_run_whose_stream_breaks_off_keeps_every_step_and_ends_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int
) -> None:
    """At some read of a block: at the start, at the first step of an arm, between two steps."""
    reads = itertools.count(1)

    def broken(stream: Any, count: int) -> Any:
        if next(reads) == read:
            raise ConnectionError("Server Disconnected\nafter 20 retries")
        return itertools.islice(stream, count)

    uninterrupted, stopped = (study_in(tmp_path / name, streaming=True, train={"save_every": 100}) for name in "ab")
    monkeypatch.setattr(documents, "STREAM_BLOCK", 5)
    uninterrupted.train_arm()
    monkeypatch.setattr(documents, "islice", broken)
    listeners: list[Recorder] = []

    def listener() -> Recorder:
        listeners.append(Recorder())
        return listeners[-1]

    with pytest.raises(
        SourceError, match=r"^data.train -- \S+texts.jsonl broke off while it was read: Server Disconnect"
    ):
        stopped.train_arm(make_listener=listener)
    stopped.train_arm(make_listener=listener)
    assert [row["step"] for each in listeners for row in each.rows] == list(range(1, STEPS + 1))
    expected, found = (final_state(study.arms["hif8"].own) for study in (uninterrupted, stopped))
    assert differences(expected, found) == []


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    study = TinyStudy(tmp_path / "a")
    study.train_arm()
    before = final_state(study.arms["hif8"].own)
    listener = Recorder()
    _, outcome = study.train(study.arms["hif8"].own, listener)
    assert listener.rows == []
    assert (outcome.steps, outcome.data_hash) == (STEPS, before["plain"]["data/data_hash"])
    assert differences(before, final_state(study.arms["hif8"].own)) == []


def test_same_seed_same_run_another_seed_another(tmp_path: Path) -> None:
    studies = [TinyStudy(tmp_path / str(i), train={"seed": seed}) for i, seed in enumerate((5, 5, 6))]
    for study in studies:
        torch.manual_seed(time.time_ns() % 1000)
        study.train_arm()
    first, same, other = (final_state(study.arms["hif8"].own) for study in studies)
    assert differences(first, same) == []
    assert first["plain"]["data/data_hash"] != other["plain"]["data/data_hash"]
    assert first["metrics"][0]["loss"] != other["metrics"][0]["loss"]


def _train_in_a_process(folder: str) -> None:
    datasets.config.HF_DATASETS_CACHE = Path(folder).parent / "cache"
    torch.set_num_threads(1)
    study = TinyStudy(Path(folder), train={"steps": 12, "save_every": 1}, warmup={"steps": 5})
    try:
        study.train_arm()
    except Interrupted as error:
        sys.exit(error.exit_code)


def _steps_recorded(folder: Path) -> int:
    return max((row["step"] for file in folder.glob("*/metrics.jsonl") for row in read_metrics(file)), default=0)


def _wait_for_step(process: Any, folder: Path, step: int) -> None:
    """Until a process has done this step, or the first that none did before it."""
    step = max(step, _steps_recorded(folder) + 1)
    while process.is_alive() and _steps_recorded(folder) < step:
        time.sleep(0.001)


def test_killed_processes_end_bit_identical(tmp_path: Path) -> None:
    """kill -9 before, at and after the switch and once SIGTERM, each at a random moment of a step; then to the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qatrun.study", "transformers.models.llama.modeling_llama"])
    whole = TinyStudy(tmp_path / "whole", train={"steps": 12, "save_every": 1}, warmup={"steps": 5})
    killed = TinyStudy(tmp_path / "killed", train={"steps": 12, "save_every": 1}, warmup={"steps": 5})

    def start(folder: str) -> Any:
        process = context.Process(target=_train_in_a_process, args=(str(tmp_path / folder),))
        process.start()
        return process

    process = start("whole")
    process.join()
    assert process.exitcode == 0
    jitter = random.Random(os.getpid())
    for step, number in ((2, signal.SIGKILL), (5, signal.SIGKILL), (7, signal.SIGTERM), (9, signal.SIGKILL)):
        process = start("killed")
        _wait_for_step(process, tmp_path / "killed", step)
        time.sleep(jitter.uniform(0, 0.02))
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode in ((3, 0) if number == signal.SIGTERM else (-signal.SIGKILL, 0))
    process = start("killed")
    process.join()
    assert process.exitcode == 0
    assert differences(final_state(whole.arms["hif8"].own), final_state(killed.arms["hif8"].own)) == []
