"""What in a study's folder is the study's, told by names and contents: the rest is somebody's, and is never deleted."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from qatrun.errors import DamagedFileError, QatrunError
from qatrun.files import UNFINISHED, read_json
from qatrun.recipe import load_recipe
from qatrun.records import Result, StudyEnvironment
from qatrun.study.layout import ArmFolder, StudyFolder

LOCK_FILE = ".lock"
FIRST_FILES = {"environment.json", "recipe.yaml"}  # written before anything is trained
_TRUNK = re.compile(r"trunk-[0-9a-f]{8}")

OF_A_STUDY = (
    *(*FIRST_FILES, "comparison.json", "comparison.csv", "comparison.txt", "seeds.json", "seeds.csv", "diagnosis.json"),
    *("report.html", "report/*.csv", ".*.partial", "report/.*.partial"),
)
_OF_A_MODEL = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.py"),
)
OF_AN_ARM = (
    *("metrics.jsonl", "alarms.jsonl", "result.json", "histograms.json", "log_perplexity.json"),
    *("checkpoints/step-*/*.safetensors", "checkpoints/step-*/progress.json", "checkpoints/step-*/manifest.json"),
    *(
        "checkpoints/.incomplete/*",
        "tensors/*.parquet",
        "**/.*.partial",
        f"**/{UNFINISHED}",
        "**/events.out.tfevents*",
        "**/hparams.yml",
    ),
    *("eval*/items.parquet", "eval*/scores.json", "eval*/lm_eval_results.json", "eval*/log_perplexity.json"),
    *("eval*/samples/*.jsonl", "quantized/plan.json", *_OF_A_MODEL, *(f"quantized/{name}" for name in _OF_A_MODEL)),
)


def is_study(folder: StudyFolder) -> bool:
    """Whether qatrun made what lies there: it holds a recipe that can be run, or says what it ran on."""
    with suppress(DamagedFileError):
        read_json(folder.environment, StudyEnvironment)
        return True
    return _loads(folder.recipe)


def is_free(folder: StudyFolder) -> bool:
    """Whether nothing lies there, or only what a study that never got to train left of its first files, torn."""
    if not folder.path.exists():
        return True
    names = {path.name for path in folder.path.iterdir() if path.name != LOCK_FILE and not path.match(".*.partial")}
    return names <= FIRST_FILES and not _loads(folder.recipe) and all(_is_torn_or_ours(folder, name) for name in names)


def own_files(folder: StudyFolder) -> set[Path]:
    """Every file that qatrun wrote there, the lock aside."""
    parts = [path for path in folder.path.iterdir() if path.is_dir() and _is_part(folder, path)]
    found = [folder.path.glob(pattern) for pattern in OF_A_STUDY]
    found += [part.glob(pattern) for part in parts for pattern in OF_AN_ARM]
    own = {file for files in found for file in files if file.is_file() or file.is_symlink()}
    return own.union(*({*own_files(replica), replica.path / LOCK_FILE} for replica in folder.replicas))


def strangers(folder: StudyFolder) -> list[str]:
    """What else lies there, relative to it."""
    own = own_files(folder) | {folder.path / LOCK_FILE}
    return sorted(
        str(file.relative_to(folder.path)) for file in folder.path.rglob("*") if file.is_file() and file not in own
    )


def _is_part(folder: StudyFolder, path: Path) -> bool:
    """Whether it is the start model's folder, a trunk's or an arm's."""
    names = {"start"}
    with suppress(QatrunError, OSError):
        names |= set(load_recipe(folder.recipe).arm_names)
    if path.name in names or _TRUNK.fullmatch(path.name):
        return True
    with suppress(DamagedFileError):  # an arm that an earlier recipe had; a copy under another name is somebody's
        return read_json(ArmFolder(path).result, Result)["arm"] == path.name
    return False


def _loads(recipe: Path) -> bool:
    with suppress(QatrunError, OSError):
        load_recipe(recipe)
        return True
    return False


def _is_torn_or_ours(folder: StudyFolder, name: str) -> bool:
    file = folder.path / name
    if not file.stat().st_size or is_study(folder):
        return True
    with suppress(DamagedFileError):
        read_json(file, object)
        return False
    return name != folder.recipe.name
