"""Where everything of a study lies on disk.

runs/<study>/
  recipe.yaml  environment.json  comparison.json  comparison.csv  comparison.txt  diagnosis.json
  report.html          the page; report/ the CSV of its figures
  start/               scores of the model before training
  trunk-<hash>/        checkpoints and metrics.jsonl of the BF16 phase that arms share
  <arm>/               a Hugging Face folder in the compute dtype (quantizers off), and in it
    quantized/         the quantized model that is scored (arms with qat)
    compressed-tensors/  and others of `serving.EXPORT_NAMES`: the same for an engine, with what was proven in export.json
    eval/              its scores; eval-quantizers-off/ those of the plain folder, eval-calibrated-<hash>/ those of
                       a diagnosis: these weights with calibrated scales (of a twin: PTQ)
    checkpoints/  metrics.jsonl  alarms.jsonl  tensors/  histograms.json  result.json

A study with `train.seeds` holds one such folder for each seed, and what they say together:
  recipe.yaml  environment.json  seeds.json  seeds.csv  comparison.txt  seed-<n>/
A study that asks contrasts of one seed has seeds.json and seeds.csv beside the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qatrun import files
from qatrun.errors import InputError
from qatrun.export import artifact
from qatrun.serving import EXPORT_NAMES
from qatrun.text import suggestion

EVAL, EVAL_OFF, EVAL_CALIBRATED = "eval", "eval-quantizers-off", "eval-calibrated-"
RESULT_FILE, HISTOGRAMS_FILE, LOG_PERPLEXITY_FILE = "result.json", "histograms.json", "log_perplexity.json"
EXPORT_FILE, CARD_FILE = "export.json", "README.md"
START, TRUNK = "start", "trunk-"
PAGE_FILE, CSV_FOLDER = "report.html", "report"
ENVIRONMENT_FILE, LOCK_FILE = "environment.json", ".lock"
FIRST_FILES = {ENVIRONMENT_FILE, files.RECIPE_FILE}  # written before anything is trained

# All that qatrun writes into a study's own folder, and below the folder of an arm, of a trunk or of the start model.
OF_A_STUDY = (
    *(*FIRST_FILES, "comparison.json", "comparison.csv", "comparison.txt", "seeds.json", "seeds.csv", "diagnosis.json"),
    *(PAGE_FILE, f"{CSV_FOLDER}/*.csv", ".*.partial", f"{CSV_FOLDER}/.*.partial"),
)
_OF_A_MODEL = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.py"),
)
_OF_AN_EXPORT = ("*.onnx", "*.onnx.data", "hif8*", "quant_model_*")
OF_AN_ARM = (
    *(CARD_FILE, files.METRICS_FILE, files.ALARMS_FILE, f"{files.TENSORS}/*.parquet"),
    *(RESULT_FILE, HISTOGRAMS_FILE, LOG_PERPLEXITY_FILE),
    *(f"{files.CHECKPOINTS}/step-*/{name}" for name in ("*.safetensors", "progress.json", "manifest.json")),
    *(f"{files.CHECKPOINTS}/.incomplete/*", "**/.*.partial", f"**/{files.UNFINISHED}"),
    *("**/events.out.tfevents*", "**/hparams.yml"),
    *(f"{EVAL}*/{name}" for name in (files.ITEMS_FILE, files.SCORES_FILE, files.SCORES_OF_LM_EVAL)),
    *(f"{EVAL}*/{LOG_PERPLEXITY_FILE}", f"{EVAL}*/{files.SAMPLES}/*.jsonl"),
    *(*_OF_A_MODEL, *(f"{artifact.FOLDER}/{name}" for name in (artifact.PLAN_FILE, *_OF_A_MODEL))),
    *(
        f"{folder}/{name}"
        for folder in EXPORT_NAMES
        for name in (EXPORT_FILE, CARD_FILE, "*.onnx", "*.onnx.data", *_OF_A_MODEL)
    ),
    *(f".{folder}.{state}/*" for folder in EXPORT_NAMES for state in ("partial", "earlier")),
)
_REPLICA = re.compile(r"seed-(0|[1-9]\d*)")


class _Below:
    """A path below a folder of ours, by its name there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: ArmFolder | StudyFolder, _owner: type) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class ArmFolder:
    """One arm's folder, or the start model's."""

    path: Path

    quantized = _Below(artifact.FOLDER)
    plan = _Below(f"{artifact.FOLDER}/{artifact.PLAN_FILE}")
    eval_off = _Below(EVAL_OFF)
    checkpoints = _Below(files.CHECKPOINTS)
    metrics = _Below(files.METRICS_FILE)
    alarms = _Below(files.ALARMS_FILE)
    histograms = _Below(HISTOGRAMS_FILE)
    result = _Below(RESULT_FILE)

    @property
    def eval(self) -> Path:
        """Its scores; the folder itself where it is one that `qatrun eval --output` wrote."""
        return self.path if (self.path / files.SCORES_FILE).is_file() else self.path / EVAL

    def eval_calibrated(self, settings: str) -> Path:
        """Scores of these weights with scales that were calibrated; `settings` is a hash of how."""
        return self.path / f"{EVAL_CALIBRATED}{settings[:8]}"


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder."""

    path: Path

    recipe = _Below(files.RECIPE_FILE)
    environment = _Below(ENVIRONMENT_FILE)
    comparison = _Below("comparison.json")
    seeds = _Below("seeds.json")  # what the seeds say together, and the contrasts
    diagnosis = _Below("diagnosis.json")
    page = _Below(PAGE_FILE)
    csv = _Below(CSV_FOLDER)  # the numbers of the page's figures

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def begun(self) -> set[str]:
        """Arms of which something is there, in no order."""
        names = {file.parent.name for name in (files.METRICS_FILE, RESULT_FILE) for file in self.path.glob(f"*/{name}")}
        return {name for name in names if name != START and not name.startswith(TRUNK)}

    @property
    def replicas(self) -> tuple[StudyFolder, ...]:
        """The studies of its seeds, by seed; none where it is run with one."""
        found = {
            int(match.group(1)): file.parent
            for file in self.path.glob(f"seed-*/{files.RECIPE_FILE}")
            if (match := _REPLICA.fullmatch(file.parent.name))  # not a copy that someone made beside them
        }
        return tuple(StudyFolder(found[seed]) for seed in sorted(found))

    def replica(self, seed: int) -> StudyFolder:
        return StudyFolder(self.path / f"seed-{seed}")

    @property
    def start(self) -> ArmFolder:
        return ArmFolder(self.path / START)

    def arm(self, name: str) -> ArmFolder:
        return ArmFolder(self.path / name)


def newest_study(output_dir: Path) -> StudyFolder | None:
    """The study whose recipe was written last."""
    recipes = sorted(output_dir.glob(f"*/{files.RECIPE_FILE}"), key=lambda file: file.stat().st_mtime)
    return StudyFolder(recipes[-1].parent) if recipes else None


def no_such_study(study: str | None, output_dir: Path) -> InputError:
    """The error for a study that is not there, with the nearest of those that are."""
    names = sorted(file.parent.name for file in output_dir.glob(f"*/{files.RECIPE_FILE}"))
    if study is None:
        return InputError(f"no study in {output_dir} yet")
    return InputError(f"no study {study!r} in {output_dir}{suggestion(study, names)}")
