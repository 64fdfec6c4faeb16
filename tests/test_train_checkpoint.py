"""Checkpoints are whole or not there, and a damaged one is found out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Recorder, TinyStudy, ctrl_c, differences, final_state

import qatrun.train.checkpoint as checkpoint_module
from qatrun.errors import CheckpointError, Interrupted, WriteError
from qatrun.files import sha256
from qatrun.train.checkpoint import Checkpoint, has_checkpoint, latest_checkpoint, read_checkpoint, write_checkpoint
from qatrun.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("datasets_cache", "one_thread")

FILES = ("model.safetensors", "optimizer.safetensors", "state.safetensors", "progress.json", "manifest.json")


def checkpoint_at(step: int) -> Checkpoint:
    tensor = torch.full((3, 4), float(step))
    data = {"ids": [1, 2], "seen": tensor.bool()}
    return Checkpoint(step, "a", {"model": {"w": tensor}, "optimizer": {"exp_avg/w": tensor.t()}, "data": data})


def without_a_clock(folder: Path) -> None:
    """Make a checkpoint one of an earlier version, which held what is the clock's beside the step."""
    progress, manifest = (json.loads((folder / name).read_text()) for name in ("progress.json", "manifest.json"))
    (folder / "progress.json").write_text(json.dumps(progress | progress.pop("clock")))
    manifest["progress.json"] = sha256(folder / "progress.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    written = checkpoint_at(7)
    back = read_checkpoint(write_checkpoint(tmp_path, written, keep_last=1))
    assert (back.step, back.identity) == (7, "a")
    for name, before in written.parts.items():
        after = back.parts[name]
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink], ids=["flipped byte", "truncated", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, checkpoint_at(step), keep_last=2)
    damage(tmp_path / "step-000002" / name)
    found, warnings = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(warnings) == 1
    assert "step-000002" in warnings[0]
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path / "step-000002")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 999_999, 1_000_000, 1_000_001):
        write_checkpoint(tmp_path, checkpoint_at(step), keep_last=2)
    assert steps_in(tmp_path) == ["step-1000000", "step-1000001"]
    found, _ = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1_000_001


def test_a_damaged_later_checkpoint_never_crowds_out_a_good_one(tmp_path: Path) -> None:
    for step in (2, 4):
        write_checkpoint(tmp_path, checkpoint_at(step), keep_last=2)
    truncate(tmp_path / "step-000004" / FILES[0])
    write_checkpoint(tmp_path, checkpoint_at(3), keep_last=1)
    found, warnings = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, warnings) == (3, [])


@pytest.mark.parametrize("broken", ["save_file", "sha256", "flush_to_disk"])
def test_a_crash_while_writing_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    write_checkpoint(tmp_path, checkpoint_at(1), keep_last=1)
    working, calls = getattr(checkpoint_module, broken), []

    def fail_at_the_second(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("no space left on device")
        return working(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, broken, fail_at_the_second)
        with pytest.raises(WriteError, match="no space"):
            write_checkpoint(tmp_path, checkpoint_at(2), keep_last=1)
    found, warnings = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, warnings) == (1, [])
    write_checkpoint(tmp_path, checkpoint_at(2), keep_last=1)
    assert steps_in(tmp_path) == ["step-000002"], "nothing half-written stays behind"


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "checkpoints") == (None, [])


@pytest.fixture
def twice(tmp_path: Path) -> tuple[TinyStudy, TinyStudy]:
    """The same study in two folders."""
    return TinyStudy(tmp_path / "a"), TinyStudy(tmp_path / "b")


def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(twice: tuple[TinyStudy, TinyStudy]) -> None:
    uninterrupted, damaged = twice
    uninterrupted.train_arm()
    own = damaged.arms["hif8"].own
    with pytest.raises(Interrupted):
        damaged.train_arm(make_listener=lambda: Recorder({6: ctrl_c}))
    flip_a_byte(own.folder / "checkpoints" / "step-000006" / "optimizer.safetensors")
    listener = Recorder()
    damaged.train(own, listener)
    assert ["step-000006" in text for text in listener.warnings] == [True]
    assert listener.rows[0]["step"] == 5, "from the checkpoint of step 4"
    assert differences(final_state(uninterrupted.arms["hif8"].own), final_state(own)) == []


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(twice: tuple[TinyStudy, TinyStudy]) -> None:
    uninterrupted, resumed = twice
    uninterrupted.train_arm()
    own = resumed.arms["hif8"].own
    with pytest.raises(Interrupted):
        resumed.train_arm(make_listener=lambda: Recorder({6: ctrl_c}))
    without_a_clock(own.folder / "checkpoints" / "step-000006")
    resumed.train(own, listener := Recorder())
    before, after = read_metrics(own.folder / "metrics.jsonl")[-2:]
    assert (listener.rows, listener.warnings) == ([after], [])
    assert after["seconds"] > before["seconds"], "it goes on counting"
    assert differences(final_state(uninterrupted.arms["hif8"].own), final_state(own)) == []


def test_an_arm_repeats_the_end_of_a_trunk_whose_last_checkpoint_is_damaged(
    twice: tuple[TinyStudy, TinyStudy],
) -> None:
    uninterrupted, damaged = twice
    uninterrupted.train_arm()
    segments = damaged.arms["hif8"]
    assert segments.trunk is not None
    damaged.train(segments.trunk)
    flip_a_byte(segments.trunk.folder / "checkpoints" / "step-000003" / "model.safetensors")
    listener = Recorder()
    damaged.train(segments.own, listener)
    assert len(listener.warnings) == 1
    assert [row["step"] for row in listener.rows] == [3, 4, 5, 6, 7]
    assert differences(final_state(uninterrupted.arms["hif8"].own), final_state(segments.own)) == []


def test_what_is_lost_of_the_record_is_said_on_a_resume(twice: tuple[TinyStudy, TinyStudy]) -> None:
    study, _ = twice
    with pytest.raises(Interrupted):
        study.train_arm(make_listener=lambda: Recorder({6: ctrl_c}))
    own = study.arms["hif8"].own
    for name in ("metrics.jsonl", "alarms.jsonl"):
        assert len((own.folder / name).read_text(encoding="utf-8").splitlines()) > 1
        (own.folder / name).write_text("torn", encoding="utf-8")
    (own.trunk / "probe.safetensors").write_bytes(b"torn")
    listener = Recorder()
    study.train(own, listener)
    steps, alarms, probe = listener.warnings
    assert "metrics.jsonl has lost 3 of the first 6 steps (the first of them step 4)" in steps  # the trunk has 1 to 3
    assert "alarms.jsonl has lost" in alarms
    assert "probe.safetensors cannot be read" in probe


@pytest.mark.parametrize(
    ("name", "text"), [("manifest.json", "null"), ("manifest.json", "{}"), ("progress.json", "[]")]
)
def test_a_checkpoint_whose_plain_data_say_nothing_is_damaged(tmp_path: Path, name: str, text: str) -> None:
    written = write_checkpoint(tmp_path, checkpoint_at(3), keep_last=1)
    (written / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(written)
    assert not has_checkpoint(tmp_path)


def test_copies_beside_checkpoints_are_none(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, checkpoint_at(3), keep_last=1)
    shutil.copytree(written, tmp_path / "step-000003 (copy)")
    shutil.copytree(written, tmp_path / "step-000009")
    found, warnings = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 3
    assert ["it is one of step 3" in text for text in warnings] == [True]


def test_what_a_stop_saved_is_not_kept_beside_what_is_due(tmp_path: Path) -> None:
    for step in (2, 4, 5, 6):
        write_checkpoint(tmp_path, checkpoint_at(step), keep_last=2, save_every=2)
    assert steps_in(tmp_path) == ["step-000004", "step-000006"]


def test_an_arm_without_its_trunk_is_refused(twice: tuple[TinyStudy, TinyStudy]) -> None:
    study, _ = twice
    with pytest.raises(CheckpointError, match="no whole checkpoint to branch from"):
        study.train(study.arms["hif8"].own)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, twice: tuple[TinyStudy, TinyStudy]) -> None:
    study, _ = twice
    study.train_arm()
    shutil.copytree(tmp_path / "a" / "hif8", tmp_path / "other" / "hif8")
    other = TinyStudy(tmp_path / "other", train={"learning_rate": 2e-2})
    with pytest.raises(CheckpointError, match="other settings"):
        other.train(other.arms["hif8"].own)
