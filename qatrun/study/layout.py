"""Where everything of a study lies on disk.

runs/<study>/
  recipe.yaml  environment.json  comparison.json  comparison.csv  comparison.txt  diagnosis.json
  report.html          the page; report/ the CSV of its figures
  start/               scores of the model before training
  trunk-<hash>/        checkpoints and metrics.jsonl of the BF16 phase that arms share
  <arm>/               a Hugging Face folder in the compute dtype (quantizers off), and in it
    quantized/         the quantized model that is scored (arms with qat)
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

from qatrun.errors import InputError
from qatrun.evaluate.scores import SUMMARY_FILE
from qatrun.export import artifact
from qatrun.recipe.wording import suggestion

EVAL, EVAL_OFF = "eval", "eval-quantizers-off"
_REPLICA = re.compile(r"seed-(0|[1-9]\d*)")


@dataclass(frozen=True)
class ArmFolder:
    """One arm's folder, or the start model's."""

    path: Path

    @property
    def quantized(self) -> Path:
        return self.path / artifact.FOLDER

    @property
    def eval(self) -> Path:
        """Its scores; the folder itself where it is one that `qatrun eval --output` wrote."""
        return self.path if (self.path / SUMMARY_FILE).is_file() else self.path / EVAL

    @property
    def eval_off(self) -> Path:
        return self.path / EVAL_OFF

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def alarms(self) -> Path:
        return self.path / "alarms.jsonl"

    @property
    def histograms(self) -> Path:
        return self.path / "histograms.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def comparison(self) -> Path:
        return self.path / "comparison.json"

    @property
    def seeds(self) -> Path:
        """What the seeds say together, and the contrasts."""
        return self.path / "seeds.json"

    @property
    def diagnosis(self) -> Path:
        return self.path / "diagnosis.json"

    @property
    def replicas(self) -> tuple[StudyFolder, ...]:
        """The studies of its seeds, by seed; none where it is run with one."""
        found = {
            int(match.group(1)): file.parent
            for file in self.path.glob("seed-*/recipe.yaml")
            if (match := _REPLICA.fullmatch(file.parent.name))  # not a copy that someone made beside them
        }
        return tuple(StudyFolder(found[seed]) for seed in sorted(found))

    def replica(self, seed: int) -> StudyFolder:
        return StudyFolder(self.path / f"seed-{seed}")

    @property
    def start(self) -> ArmFolder:
        return ArmFolder(self.path / "start")

    def arm(self, name: str) -> ArmFolder:
        return ArmFolder(self.path / name)


def newest_study(output_dir: Path) -> StudyFolder | None:
    """The study whose recipe was written last."""
    recipes = sorted(output_dir.glob("*/recipe.yaml"), key=lambda file: file.stat().st_mtime)
    return StudyFolder(recipes[-1].parent) if recipes else None


def no_such_study(study: str | None, output_dir: Path) -> InputError:
    """The error for a study that is not there, with the nearest of those that are."""
    names = sorted(file.parent.name for file in output_dir.glob("*/recipe.yaml"))
    if study is None:
        return InputError(f"no study in {output_dir} yet")
    return InputError(f"no study {study!r} in {output_dir}{suggestion(study, names)}")
