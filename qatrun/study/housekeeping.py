"""What studies lie in a folder, and what of a finished one may go: checkpoints, which only a resume and new arms need."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from qatrun.errors import DamagedFileError, InputError
from qatrun.files import read_json, writing
from qatrun.layout import CHECKPOINTS, ArmFolder, StudyFolder
from qatrun.records.comparison import StudyComparison
from qatrun.records.seeds import Seeds
from qatrun.records.training import Result
from qatrun.study.claim import locked
from qatrun.study.contents import own_files


@dataclass(frozen=True)
class StudySummary:
    """One study.

    Attributes:
        state: its verdict, or "unfinished".
        freed_bytes: that `clean` would free.
    """

    name: str
    date: str
    arms: tuple[str, ...]
    state: str
    num_bytes: int
    freed_bytes: int


def list_studies(output_dir: Path) -> list[StudySummary]:
    """Every study in a folder, the newest first."""
    found = [StudyFolder(file.parent) for file in output_dir.glob("*/recipe.yaml")]
    return [_summary(one) for one in sorted(found, key=lambda one: one.recipe.stat().st_mtime, reverse=True)]


def spare_files(folder: StudyFolder) -> list[Path]:
    """Checkpoints of arms and trunks that are trained; scores, weights and records stay.

    Raises:
        InputError: the study is not finished: a resume needs them.
    """
    if _state(folder) == "unfinished":
        raise InputError(f"{folder.path} is not finished: its checkpoints are what --resume goes on from")
    spare = [
        file
        for file in own_files(folder)
        if CHECKPOINTS in file.relative_to(folder.path).parts and _is_trained(folder, file)
    ]
    return sorted(spare)


def clean(folder: StudyFolder) -> int:
    """Delete them; returns how many bytes that freed."""
    with locked(folder), writing(folder.path):
        spare = spare_files(folder)
        freed = sum(file.stat().st_size for file in spare)
        for file in spare:
            file.unlink()
        parents = {parent for file in spare for parent in file.parents if CHECKPOINTS in parent.parts}
        for empty in sorted(parents, reverse=True):
            if not any(empty.iterdir()):
                empty.rmdir()
    return freed


def _summary(folder: StudyFolder) -> StudySummary:
    state = _state(folder)
    arms = sorted({*folder.begun, *(name for replica in folder.replicas for name in replica.begun)})
    return StudySummary(
        folder.name,
        f"{datetime.fromtimestamp(folder.recipe.stat().st_mtime):%Y-%m-%d %H:%M}",
        tuple(arms),
        state,
        sum(file.stat().st_size for file in own_files(folder)),
        0 if state == "unfinished" else sum(file.stat().st_size for file in spare_files(folder)),
    )


def _state(folder: StudyFolder) -> str:
    try:
        if folder.comparison.is_file():
            return read_json(folder.comparison, StudyComparison).verdict or "finished"
        return (read_json(folder.seeds, Seeds).verdict or "finished") if folder.seeds.is_file() else "unfinished"
    except DamagedFileError:
        return "damaged"


def _is_trained(folder: StudyFolder, file: Path) -> bool:
    """Whether the arm or trunk that a checkpoint is of has its result."""
    parts = file.relative_to(folder.path).parts
    arm = ArmFolder(folder.path.joinpath(*parts[: parts.index(CHECKPOINTS)]))
    if not arm.result.is_file():
        return False
    try:
        read_json(arm.result, Result)
    except DamagedFileError:
        return "steps" in arm.result.read_text(encoding="utf-8")  # of a trunk
    return True
