"""What a page is made of: a study's records, whoever read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qatrun.quant import QuantPlan
from qatrun.records.comparison import Pair, StudyComparison
from qatrun.records.diagnosis import ArmDiagnosis, StudyDiagnosis
from qatrun.records.environment import Environment
from qatrun.records.export import Exported
from qatrun.records.quantized import HistogramRecord
from qatrun.records.seeds import Seeds
from qatrun.records.training import AlarmRow, MetricsRow


@dataclass(frozen=True)
class ArmContent:
    """One arm. What an older study or a BF16 arm does not have is empty or None.

    Attributes:
        index: place in the recipe; decides the arm's colour in every figure.
        coverage: how much it quantizes, in words.
        metrics: a row a step, trunk included.
        tensors: pyarrow table of quantized tensors' statistics, the trunk left out.
    """

    name: str
    index: int
    twin: str | None
    coverage: str | None = None
    metrics: Sequence[MetricsRow] = ()
    tensors: Any = None
    histograms: Sequence[HistogramRecord] = ()
    alarms: Sequence[AlarmRow] = ()
    plan: QuantPlan | None = None
    exports: Sequence[Exported] = ()

    @property
    def switch_step(self) -> int | None:
        """First step (1-based) with fake quantization on; None where there is none."""
        return next((row["step"] for row in self.metrics if row["phase"] == "qat"), None)


@dataclass(frozen=True)
class Flip:
    """An item that the twin and the arm answer differently.

    Attributes:
        item: its question where that may be shown, else its name.
        answer: the right one; empty where it may not be shown.
        shift: of the right answer's log-likelihood, arm minus twin, nats.
    """

    arm: str
    task: str
    item: str
    answer: str
    to_wrong: bool
    shift: float


@dataclass(frozen=True)
class StudyContent:
    """A study with one seed.

    Attributes:
        recipe: the YAML text.
        comparison: None where the study is not finished.
        diagnosis: None where the study was not diagnosed.
        model: path or hub id of the model that the study starts from; empty where the recipe cannot be read.
        summary: for its contrasts; None where the recipe asks none.
        changed: a phrase on each file that is not what was scored any more.
        forgetting_limit: nats a token from which a rise of the loss on known text is an alarm; None: never.
        differences: key of the recipe -> arm -> its value, where arms differ.
        flips: items that quantization turned, a few of each arm and task.
    """

    name: str
    recipe: str
    environment: Environment
    comparison: StudyComparison | None
    diagnosis: StudyDiagnosis | None
    arms: tuple[ArmContent, ...]
    model: str = ""
    summary: Seeds | None = None
    changed: Sequence[str] = ()
    forgetting_limit: float | None = None
    differences: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    flips: Sequence[Flip] = ()

    @property
    def pairs(self) -> Sequence[Pair]:
        """Every quantized arm beside its twin."""
        return self.comparison.pairs if self.comparison else ()

    @property
    def diagnosed(self) -> Mapping[str, ArmDiagnosis]:
        """Arm -> what its diagnosis says."""
        return self.diagnosis.arms if self.diagnosis else {}


@dataclass(frozen=True)
class SeedsContent:
    """A study with several seeds.

    Attributes:
        pages: seed -> address of its own page, relative to this one.
    """

    name: str
    recipe: str
    environment: Environment
    seeds: Seeds
    pages: Mapping[int, str]
    model: str = ""
