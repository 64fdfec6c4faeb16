"""Files of ours: whole or not there, with the mode of any new file; and one sentence where one cannot be written or read."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from qatrun.errors import DamagedFileError, WriteError
from qatrun.files import filled_folder, read_json, read_rows, replace_file, whole_file, writing
from qatrun.records.comparison import StudyComparison
from qatrun.records.quantized import Quantized
from qatrun.records.training import AlarmRow, ArmResult, MetricsRow
from qatrun.train.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint

LARGE = torch.zeros(100_000)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 64 KiB: the operating system itself refuses."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)], ids=oct)
def test_weights_have_the_mode_of_any_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "one/model.safetensors") as partial:
            save_file({"w": LARGE}, partial)
        with filled_folder(tmp_path / "two"):
            save_file({"w": LARGE}, tmp_path / "two/model.safetensors")
        replace_file(tmp_path / "three/notes.json", b"{}")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("*/*")} == {mode}


WRITES: dict[str, Any] = {
    "plain": lambda file: file.write_bytes(bytes(10**6)),
    "safetensors": lambda file: save_file({"w": LARGE}, file),
    "parquet": lambda file: pq.write_table(pa.table({"w": list(range(10**5))}), file),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_disk_that_refuses_is_one_sentence_and_loses_nothing(tmp_path: Path, write: Any, small_disk: None) -> None:
    file = tmp_path / "there.bin"
    file.write_bytes(b"before")
    with pytest.raises(WriteError) as refused, whole_file(file) as partial:
        write(partial)
    assert str(refused.value).startswith(f"cannot write {file}: ")
    assert "File too large" in str(refused.value)
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file], "nothing half-written takes up room"


def test_a_disk_that_refuses_a_checkpoint_leaves_the_one_before_it(tmp_path: Path, small_disk: None) -> None:
    write_checkpoint(tmp_path, Checkpoint(1, "a", {"model": {"w": LARGE[:3]}}), keep_last=1)
    with pytest.raises(WriteError, match="File too large"):
        write_checkpoint(tmp_path, Checkpoint(2, "a", {"model": {"w": LARGE}}), keep_last=1)
    found, warnings = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, warnings) == (1, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_an_error_of_another_kind_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not of the disk"), writing(tmp_path):
        raise ValueError("not of the disk")
    with pytest.raises(WriteError, match="No space left on device"), writing(tmp_path):
        raise Exception("No space left on device (os error 28)")  # as tokenizers has it


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (None, ArmResult, "No such file"),
        (b"", ArmResult, "Expecting value"),
        (b'{"arm": "hif', ArmResult, "Unterminated string"),
        (b"\xff\xfe\x00", ArmResult, "can't decode"),
        (b"null", ArmResult, "valid dictionary"),
        (b"[]", StudyComparison, "valid dictionary"),
        (b"[" * 100_000, StudyComparison, "recursion"),
        (b'{"verdict": "splendid", "pairs": []}', StudyComparison, "verdict: Input should be 'within'"),
        (b'{"verdict": null, "pairs": [{}]}', StudyComparison, "pairs.0.arm: Field required"),
        (b'{"format_version": 1, "compute_dtype": "load", "plan": {}}', Quantized, "compute_dtype: "),
        (b'{"format_version": "1"}', Quantized, "format_version: "),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(
    tmp_path: Path, content: bytes | None, kind: Any, reason: str
) -> None:
    file = tmp_path / "record.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DamagedFileError) as damaged:
        read_json(file, kind)
    (problem,) = damaged.value.problems
    assert str(problem).startswith(f"{file} cannot be read: ")
    assert reason in str(problem)
    assert "\n" not in str(problem)


ROW = '{"step": 1, "phase": "bf16", "loss": 2.5}\n'


@pytest.mark.parametrize(
    ("text", "kind", "rows"),
    [
        ("", MetricsRow, 0),
        (ROW * 2, MetricsRow, 2),
        (ROW + ROW[:-9], MetricsRow, 1),  # a crash
        (ROW + ROW[:-9] + "\n" + ROW, MetricsRow, "line 2: "),
        (ROW.replace("2.5", "NaN"), MetricsRow, "line 1: loss: "),
        (ROW.replace("1", "-1"), MetricsRow, "line 1: step: "),
        ("[]\n", AlarmRow, "line 1: Input should be a valid dictionary"),
        ("\x00" * 40 + "\n", AlarmRow, "line 1: "),
    ],
)
def test_rows_that_were_written_whole_are_read(tmp_path: Path, text: str, kind: Any, rows: int | str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text, encoding="utf-8")
    if isinstance(rows, int):
        assert len(read_rows(file, kind)) == rows
        return
    with pytest.raises(DamagedFileError) as damaged:
        read_rows(file, kind)
    assert f"{file} cannot be read: {rows}" in str(damaged.value)
    assert len(read_rows(file, kind, skip_damaged=True)) == text.count(ROW)
