"""Nothing of a study is lost that its user has not given up, and what a resume ends in."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from studies import SHORT, checksums, interrupt_at, outcome, read
from tiny_world import run_qatrun

from qatrun.report import TerminalDisplay
from qatrun.train.metrics import read_metrics

# Nothing is lost that a user has not given up.

FINISHED = (
    "tiny.yaml:1: name -- runs/tiny holds a study that is finished (--overwrite to throw it away, or another name)\n"
)


def test_a_finished_study_is_not_overwritten(world: Path) -> None:
    before = checksums(world)
    assert run_qatrun("train", "tiny.yaml", cwd=world)[::2] == (2, FINISHED)
    assert checksums(world) == before


def test_resume_of_a_finished_study_only_compares_again(world: Path) -> None:
    before = checksums(world)
    for name in ("comparison.json", "comparison.csv", "comparison.txt"):
        (world / "runs/tiny" / name).unlink()
    ran = run_qatrun("train", "tiny.yaml", "--resume", cwd=world)
    assert ran.code == 0, ran.err
    assert "hif8: done already" in ran.out
    assert "training hif8" not in ran.out
    assert "scoring" not in ran.out
    assert checksums(world) == before


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("train.learning_rate=0.01", "train.learning_rate (0.05 -> 0.01)"),
        ("arms.hif8={qat: {format: int8}}", "arms.hif8.qat.format (not given -> 'int8')"),
        ("eval.batch_size=20", "eval.batch_size (40 -> 20)"),
    ],
)
def test_resume_with_another_recipe_is_refused(world: Path, setting: str, shown: str) -> None:
    before = checksums(world)
    ran = run_qatrun("train", "tiny.yaml", "--resume", "--set", setting, cwd=world)
    assert ran.code == 2
    assert f"runs/tiny was made with other settings: {shown}; --overwrite it or give another name" in ran.err
    assert checksums(world) == before


def test_overwrite_starts_from_nothing_and_leaves_what_is_no_part_of_a_study(world: Path) -> None:
    study, copy = world / "runs/tiny", world / "runs/tiny/hif8/checkpoints/step-000040 (copy)/notes.md"
    shutil.copytree(study / "start", study / "start-backup")
    strangers = [study / "notes.txt", study / "hif8/plot.png", copy]
    for file in strangers:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine", encoding="utf-8")
    before = checksums(study)
    ran = run_qatrun("train", "tiny.yaml", "--overwrite", *SHORT, cwd=world)
    assert ran.code == 0, ran.err
    assert [file.read_text() for file in strangers] == ["mine"] * 3
    named = "hif8/checkpoints/step-000040 (copy)/notes.md, hif8/plot.png, notes.txt, start-backup/eval/items.parquet"
    assert f"left in runs/tiny, as no part of the study that was thrown away: {named}" in ran.out
    assert (study / "start-backup/result.json").is_file()
    old = {name for name in before if "step-0000" in name and "copy" not in name}
    assert not old & checksums(study).keys()
    assert read(world / "runs/tiny/hif8/result.json")["match"]["steps"] == 4


def test_overwrite_throws_away_nothing_but_studies(world: Path) -> None:
    precious = world / "runs/thesis/chapter1.txt"
    precious.parent.mkdir()
    precious.write_text("It was a dark and stormy night.", encoding="utf-8")
    ran = run_qatrun("train", "tiny.yaml", "--overwrite", "--set", "name=thesis", cwd=world)
    message = "name -- runs/thesis holds something that is no study; give another name"
    assert ran[::2] == (2, f"--set name=thesis: {message}\n")
    assert precious.is_file()


def test_a_folder_without_anything_in_it_is_free(world: Path) -> None:
    (world / "runs/free").mkdir()
    assert run_qatrun("train", "tiny.yaml", "--set", "name=free", *SHORT, cwd=world).code == 0


def test_resume_and_overwrite_exclude_each_other(world: Path) -> None:
    ran = run_qatrun("train", "tiny.yaml", "--resume", "--overwrite", cwd=world)
    assert ran == (2, "", "--resume and --overwrite exclude each other\n")
    assert (world / "runs/tiny/comparison.json").is_file()


# Interruptions.


def test_a_study_interrupted_again_and_again_ends_like_one_that_was_not(world: Path) -> None:
    finished = outcome(world / "runs/tiny")
    shutil.rmtree(world / "runs")
    for segment, step, number in (
        ("trunk", 5, signal.SIGINT),
        ("bf16", 13, signal.SIGTERM),
        ("hif8", 11, signal.SIGINT),
    ):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, segment, step, lambda number=number: signal.raise_signal(number))
            ran = run_qatrun("train", "tiny.yaml", "--resume", cwd=world)
        assert ran.code == 3
        assert ran.err == f"{signal.Signals(number).name} at step {step} of {segment}; saved: go on with --resume\n"
        assert not (world / "runs/tiny/comparison.json").exists()
    refused = run_qatrun("train", "tiny.yaml", cwd=world)
    choices = "--resume to go on with it, --overwrite to throw it away, or another name"
    unfinished = f"tiny.yaml:1: name -- runs/tiny holds a study that is unfinished ({choices})\n"
    assert refused[::2] == (2, unfinished)
    assert run_qatrun("train", "tiny.yaml", "--resume", cwd=world).code == 0
    assert outcome(world / "runs/tiny") == finished


def test_ctrl_c_while_scoring_is_not_a_verdict(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = outcome(world / "runs/tiny")
    shutil.rmtree(world / "runs/tiny/hif8/eval")
    (world / "runs/tiny/hif8/result.json").unlink()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TerminalDisplay, "on_scored", stop)
        ran = run_qatrun("train", "tiny.yaml", "--resume", cwd=world)
    assert (ran.code, ran.err) == (3, "interrupted: what is saved in runs/tiny is kept; go on with --resume\n")
    assert run_qatrun("train", "tiny.yaml", "--resume", cwd=world).code == 0
    assert outcome(world / "runs/tiny") == finished


KILLED = """
import os, signal, sys
import pytest, torch
from studies import interrupt_at
from qatrun import cli
torch.set_num_threads(1)
interrupt_at(pytest.MonkeyPatch(), "hif8", 26, lambda: os.kill(os.getpid(), signal.SIGKILL))
sys.argv = ["qatrun", "train", "tiny.yaml"]
cli.main()
"""


def test_a_study_killed_outright_ends_like_one_that_was_not(world: Path) -> None:
    finished = outcome(world / "runs/tiny")
    shutil.rmtree(world / "runs")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=world, env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(read_metrics(world / "runs/tiny/hif8/metrics.jsonl")) == 26  # past the checkpoint of step 24
    ran = run_qatrun("train", "tiny.yaml", "--resume", cwd=world)
    assert ran.code == 0, ran.err
    assert outcome(world / "runs/tiny") == finished


def test_a_loss_that_is_not_finite_stops_with_3_and_says_where(world: Path) -> None:
    options = ("--set", "name=nan", "--set", "train.learning_rate=1e30", "--set", "train.lr_warmup_steps=0")
    ran = run_qatrun("train", "tiny.yaml", *options, cwd=world)
    assert ran.code == 3
    assert "at step 2 of trunk; first bad: " in ran.err
    assert ran.err.count("\n") == 1
