"""What a page is made of: a study as plain data, whoever read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qatrun.quant import QuantPlan

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ArmContent:
    """One arm. What an older study or a BF16 arm does not have is empty or None.

    Attributes:
        index: place in the recipe; decides the arm's colour in every figure.
        record: what training wrote, as in result.json.
        metrics: a row a step, trunk included, as in metrics.jsonl.
        tensors: pyarrow table of quantized tensors' statistics, the trunk left out.
        histograms: entries of histograms.json.
        alarms: rows of alarms.jsonl.
        plan: which linears are quantized and how.
    """

    name: str
    index: int
    twin: str | None
    record: Row = field(default_factory=dict)
    metrics: Sequence[Row] = ()
    tensors: Any = None
    histograms: Sequence[Row] = ()
    alarms: Sequence[Row] = ()
    plan: QuantPlan | None = None

    @property
    def switch_step(self) -> int | None:
        """First step (1-based) with fake quantization on; None where there is none."""
        return next((row["step"] for row in self.metrics if row["phase"] == "qat"), None)


@dataclass(frozen=True)
class StudyContent:
    """A study with one seed.

    Attributes:
        recipe: the YAML text.
        comparison: as in comparison.json; None where the study is not finished.
        diagnosis: as in diagnosis.json; None where the study was not diagnosed.
        model: path or hub id of the model that the study starts from; empty where the recipe cannot be read.
        summary: as in seeds.json, for its contrasts; None where the recipe asks none.
    """

    name: str
    recipe: str
    environment: Row
    comparison: Row | None
    diagnosis: Row | None
    arms: tuple[ArmContent, ...]
    model: str = ""
    summary: Row | None = None

    @property
    def pairs(self) -> Sequence[Row]:
        """Every quantized arm beside its twin."""
        return self.comparison["pairs"] if self.comparison else ()

    def arm(self, name: str) -> ArmContent:
        """The arm of that name.

        Raises:
            KeyError: no such arm.
        """
        return {arm.name: arm for arm in self.arms}[name]


@dataclass(frozen=True)
class SeedsContent:
    """A study with several seeds.

    Attributes:
        seeds: as in seeds.json.
        pages: seed -> address of its own page, relative to this one.
    """

    name: str
    recipe: str
    environment: Row
    seeds: Row
    pages: Mapping[int, str]
    model: str = ""
