"""What of an arm is done, and still there as it was scored: the rest is made again, which gives the same."""

from __future__ import annotations

from pathlib import Path

from qatrun.errors import DamagedFileError, InputError
from qatrun.evaluate.scores import Scores
from qatrun.evaluate.text import load_texts
from qatrun.files import content_sha256, read_json
from qatrun.layout import PLAN_FILE, QUANTIZED, SCORED_FILE, WEIGHTS_FILES, ArmFolder
from qatrun.records.scores import ScoredModel
from qatrun.records.training import ArmResult, Result
from qatrun.study.display import Display

WEIGHTS = (WEIGHTS_FILES, f"{QUANTIZED}/{WEIGHTS_FILES}", f"{QUANTIZED}/{PLAN_FILE}")
FROM = "from the newest checkpoint that is whole"


def finished(folder: ArmFolder, display: Display) -> ArmResult | None:
    """The record of an arm that is trained and whose weights are those that were scored; else None, and why is said."""
    if not folder.result.is_file():
        return None
    try:
        record = read_json(folder.result, ArmResult)
    except DamagedFileError as error:
        display.on_warning(f"{error}; made again, {FROM}")
        return None
    if changed := changed_weights(folder, record):
        display.on_warning(f"{', '.join(changed)}: made again, {FROM}")
        return None
    return record


def weights_of(folder: ArmFolder) -> dict[str, str]:
    """Weights file or plan, relative to the arm's folder -> its checksum, of all that is scored."""
    files = [file for name in WEIGHTS for file in folder.path.glob(name)]
    return {file.relative_to(folder.path).as_posix(): content_sha256(file) for file in sorted(files)}


def changed_weights(folder: ArmFolder, record: ArmResult) -> list[str]:
    """A phrase on each weights file or plan that is not what was scored."""
    now = weights_of(folder)
    return [
        f"{folder.path / name} {'is not what was scored' if name in now else 'is gone'}"
        for name, checksum in record.weights.items()
        if now.get(name) != checksum
    ]


def changed_since_scored(folder: ArmFolder) -> list[str]:
    """The same of an arm's folder, whose record may be missing or say nothing of weights."""
    if (folder.path / SCORED_FILE).is_file():  # `qatrun eval --output`
        of_files = read_json(folder.path / SCORED_FILE, ScoredModel).weights
        return [
            f"{name} {'is not what was scored' if Path(name).is_file() else 'is gone'}"
            for name, checksum in of_files.items()
            if not Path(name).is_file() or content_sha256(Path(name)) != checksum
        ]
    if not folder.result.is_file() or "weights" not in read_json(folder.result, Result).to_dict():
        return []
    return changed_weights(folder, read_json(folder.result, ArmResult))


def scores_lost(folder: ArmFolder) -> str:
    """Why the scores of the start model or of an arm must be made again; empty where they need not."""
    try:
        perplexity = read_json(folder.result, Result).perplexity
        for place in (folder.eval, *([folder.eval_off] if "off" in perplexity else [])):
            Scores.load(place)
            load_texts(place)
    except InputError as error:
        return str(error)
    return ""
