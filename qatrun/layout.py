"""Where everything of a study lies on disk.

runs/<study>/
  recipe.yaml  environment.json  comparison.json  comparison.csv  comparison.txt  diagnosis.json
  fix.json             remedies that were tried, and what each gave back
  qat_ptq.csv          every trained arm against one of the same format that was calibrated alone
  report.html          the page; report/ the CSV of its figures
  start/               scores of the model before training, and known_text.safetensors: text of what it knew
  trunk-<hash>/        checkpoints and metrics.jsonl of the BF16 phase that arms share
  <arm>/               a Hugging Face folder in the compute dtype (quantizers off), and in it
    quantized/         the quantized model that is scored (arms with qat)
    compressed-tensors/  and others of `serving.EXPORT_NAMES`: the same for an engine, with what was proven in export.json
    eval/              its scores; eval-quantizers-off/ those of the plain folder, eval-calibrated-<hash>/ those of
                       a diagnosis: these weights with calibrated scales (of a twin or the start model: PTQ)
    checkpoints/  metrics.jsonl  alarms.jsonl  tensors/  histograms.json  result.json

A study with `train.seeds` holds one such folder for each seed, and what they say together:
  recipe.yaml  environment.json  seeds.json  seeds.csv  comparison.txt  seed-<n>/
A study that asks contrasts of one seed has seeds.json and seeds.csv beside the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qatrun.errors import InputError
from qatrun.serving import EXPORT_NAMES
from qatrun.text import suggestion

PARTIAL = ".*.partial"  # a file of this name is written first
UNFINISHED = ".tmp??????"  # what safetensors leaves where it is killed
EXPORT_FILE, CARD_FILE = "export.json", "README.md"
START, TRUNK = "start", "trunk-"
PAGE_FILE, CSV_FOLDER = "report.html", "report"
RECIPE_FILE, ENVIRONMENT_FILE, LOCK_FILE = "recipe.yaml", "environment.json", ".lock"
FIRST_FILES = {ENVIRONMENT_FILE, RECIPE_FILE}  # written before anything is trained

METRICS_FILE, ALARMS_FILE, PROBE_FILE = "metrics.jsonl", "alarms.jsonl", "probe.safetensors"
RESULT_FILE, HISTOGRAMS_FILE = "result.json", "histograms.json"
CHECKPOINTS, INCOMPLETE, PROGRESS_FILE, MANIFEST_FILE = "checkpoints", ".incomplete", "progress.json", "manifest.json"
SHARDS = "shard-*.safetensors"  # of a checkpoint that several processes wrote
TENSORS, TENSORS_ENDING, UNFINISHED_TENSORS = "tensors", ".parquet", "unfinished.parquet"
QUANTIZED, PLAN_FILE, WEIGHTS_FILE, WEIGHTS_FILES = "quantized", "plan.json", "model.safetensors", "model*.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"  # beside weights in several files
QUANT_METHOD = "qatrun"  # in a quantized folder's config.json

EVAL, EVAL_OFF, EVAL_CALIBRATED = "eval", "eval-quantizers-off", "eval-calibrated-"
SCORES_FILE, ITEMS_FILE, TEXT_FILE = "scores.json", "items.parquet", "text.json"
LOG_PERPLEXITY_FILE = "log_perplexity.json"  # of an earlier version
KNOWN_TEXT_FILE = "known_text.safetensors"
SCORED_FILE = "scored.json"  # of `qatrun eval --output`
SCORES_OF_LM_EVAL, SAMPLES = "lm_eval_results.json", "samples"

# All that qatrun writes into a study's own folder, and below the folder of an arm, of a trunk or of the start model.
OF_A_STUDY = (
    *(*FIRST_FILES, "comparison.json", "comparison.csv", "comparison.txt", "seeds.json", "seeds.csv"),
    *("diagnosis.json", "fix.json", "qat_ptq.csv"),
    *(PAGE_FILE, f"{CSV_FOLDER}/*.csv", PARTIAL, f"{CSV_FOLDER}/{PARTIAL}"),
)
_OF_A_MODEL = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.py"),
)
_OF_AN_EXPORT = ("*.onnx", "*.onnx.data", "hif8*", "quant_model_*")
OF_AN_ARM = (
    *(CARD_FILE, METRICS_FILE, ALARMS_FILE, f"{TENSORS}/*{TENSORS_ENDING}"),
    *(RESULT_FILE, HISTOGRAMS_FILE, LOG_PERPLEXITY_FILE),
    *(f"{CHECKPOINTS}/step-*/{name}" for name in ("*.safetensors", PROGRESS_FILE, MANIFEST_FILE)),
    *(f"{CHECKPOINTS}/{INCOMPLETE}/*", f"**/{PARTIAL}", f"**/{UNFINISHED}"),
    *("**/events.out.tfevents*", "**/hparams.yml"),
    *(f"{EVAL}*/{name}" for name in (ITEMS_FILE, SCORES_FILE, SCORES_OF_LM_EVAL, TEXT_FILE)),
    *(f"{EVAL}*/{LOG_PERPLEXITY_FILE}", f"{EVAL}*/{SAMPLES}/*.jsonl"),
    *(*_OF_A_MODEL, *(f"{QUANTIZED}/{name}" for name in (PLAN_FILE, *_OF_A_MODEL))),
    *(f"{folder}/{name}" for folder in EXPORT_NAMES for name in (EXPORT_FILE, CARD_FILE, *_OF_A_MODEL, *_OF_AN_EXPORT)),
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

    quantized = _Below(QUANTIZED)
    plan = _Below(f"{QUANTIZED}/{PLAN_FILE}")
    eval_off = _Below(EVAL_OFF)
    checkpoints = _Below(CHECKPOINTS)
    metrics = _Below(METRICS_FILE)
    alarms = _Below(ALARMS_FILE)
    histograms = _Below(HISTOGRAMS_FILE)
    result = _Below(RESULT_FILE)
    known_text = _Below(KNOWN_TEXT_FILE)  # of the start model only

    @property
    def eval(self) -> Path:
        """Its scores; the folder itself where it is one that `qatrun eval --output` wrote."""
        return self.path if (self.path / SCORES_FILE).is_file() else self.path / EVAL

    def eval_calibrated(self, settings: str) -> Path:
        """Scores of these weights with scales that were calibrated; `settings` is a hash of how."""
        return self.path / f"{EVAL_CALIBRATED}{settings[:8]}"


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder."""

    path: Path

    recipe = _Below(RECIPE_FILE)
    environment = _Below(ENVIRONMENT_FILE)
    comparison = _Below("comparison.json")
    seeds = _Below("seeds.json")  # what the seeds say together, and the contrasts
    diagnosis = _Below("diagnosis.json")
    fix = _Below("fix.json")
    over_ptq = _Below("qat_ptq.csv")  # trained arms against calibrated ones
    page = _Below(PAGE_FILE)
    csv = _Below(CSV_FOLDER)  # the numbers of the page's figures

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def begun(self) -> set[str]:
        """Arms of which something is there, in no order."""
        names = {file.parent.name for name in (METRICS_FILE, RESULT_FILE) for file in self.path.glob(f"*/{name}")}
        return {name for name in names if name != START and not name.startswith(TRUNK)}

    @property
    def replicas(self) -> tuple[StudyFolder, ...]:
        """The studies of its seeds, by seed; none where it is run with one."""
        found = {
            int(match.group(1)): file.parent
            for file in self.path.glob(f"seed-*/{RECIPE_FILE}")
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


def step_name(step: int, ending: str = "") -> str:
    """Of what is kept of one step; in order as text, too."""
    return f"step-{step:06d}{ending}"


def by_step(folder: Path, ending: str = "") -> dict[int, Path]:
    """Step -> what has its name in a folder, in order; a copy that someone made beside them is none."""
    found = {path: re.fullmatch(rf"step-(\d+){re.escape(ending)}", path.name) for path in folder.glob("step-*")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def newest_study(output_dir: Path) -> StudyFolder | None:
    """The study whose recipe was written last."""
    recipes = sorted(output_dir.glob(f"*/{RECIPE_FILE}"), key=lambda file: file.stat().st_mtime)
    return StudyFolder(recipes[-1].parent) if recipes else None


def no_such_study(study: str | None, output_dir: Path) -> InputError:
    """The error for a study that is not there, with the nearest of those that are."""
    names = sorted(file.parent.name for file in output_dir.glob(f"*/{RECIPE_FILE}"))
    if study is None:
        return InputError(f"no study in {output_dir} yet")
    return InputError(f"no study {study!r} in {output_dir}{suggestion(study, names)}")
