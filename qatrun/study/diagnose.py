"""`qatrun diagnose`: what a drop is made of, what broke, where, since when and what to change.

Two more models are scored for each arm that was trained with quantizers, its twin quantized after training (PTQ), unless the
study has that as an arm, and the arm with fresh scales; `evaluate.attribution` holds the rule. What is scored already is not
scored again.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qatrun.data import open_data
from qatrun.errors import DamagedFileError, InputError, Problem
from qatrun.evaluate import attribution
from qatrun.evaluate.attribution import Models
from qatrun.evaluate.causes import causes as found_causes
from qatrun.evaluate.scores import Scores
from qatrun.evaluate.text import load_texts, perplexity
from qatrun.export import artifact
from qatrun.files import read_json, write_json
from qatrun.layout import START, ArmFolder, StudyFolder
from qatrun.model import DTYPES
from qatrun.quant import QuantPlan, calibrated_plan, finest_plan, freeze
from qatrun.ranks import world
from qatrun.recipe import Arm, CalibrationConfig, Recipe, load_recipe
from qatrun.records.diagnosis import ArmDiagnosis, Cause, Effect, StudyDiagnosis, TensorRecord
from qatrun.records.training import ArmResult
from qatrun.scheme import Slot
from qatrun.study.calibrating import calibrated_alike
from qatrun.study.display import ScoringDisplay
from qatrun.study.doneness import changed_weights, scores_lost
from qatrun.study.histograms import write_histograms
from qatrun.study.joint import score_together
from qatrun.study.known_text import KnownText, known_text
from qatrun.study.records import SHOWN, clipping_limit, first_alarms, last_probe, never_too_small, tensor_records
from qatrun.study.sentence import Said
from qatrun.study.texts import has_order, study_texts
from qatrun.study.variants import calibrated, calibration_batches
from qatrun.tokenizer import load_tokenizer


def diagnose(folder: StudyFolder, display: ScoringDisplay) -> StudyDiagnosis:
    """Diagnose every quantized arm of a finished study that has a twin; also written to diagnosis.json.

    Raises:
        InputError: no finished study there, or no arm to diagnose.
    """
    if not folder.recipe.is_file() or not folder.comparison.is_file():
        raise InputError(Problem(f"no finished study in {folder.path}", "study"))
    recipe = load_recipe(folder.recipe)
    arms = recipe.arm_by_name.values()
    found = {arm.name: _Diagnosis(folder, recipe, arm, display).run() for arm in arms if arm.twin is not None}
    if not found:
        raise InputError(Problem(f"{folder.path} has no quantized arm with a BF16 twin to diagnose", "study"))
    worst = max(found.values(), key=lambda arm: len(arm.findings))
    result = StudyDiagnosis(sentence=worst.sentence, arms=found)
    write_json(folder.diagnosis, result)
    return result


@dataclass
class _Diagnosis:
    """One arm's."""

    folder: StudyFolder
    recipe: Recipe
    arm: Arm
    display: ScoringDisplay

    def run(self) -> ArmDiagnosis:
        """Score what is missing, and say what it shows."""
        mine, twin = self.folder.arm(self.arm.name), self.folder.arm(str(self.arm.twin))
        records = tensor_records(mine.path, self.recipe.monitor.alarms)
        self._check_weights(mine, *(() if self.arm.twin == START else (twin,)))
        models = self._models(mine, twin, records)
        alarms = first_alarms(mine)
        limit = clipping_limit(self.recipe.monitor.alarms)
        clipped = any(record.clip_fraction > limit for record in records) or "saturation" in alarms
        measures = models.measures()
        foreign = any(read.value > 0 for read in measures.beyond_frequency.values())
        known = _known(self.folder.start)
        found = found_causes(
            measures,
            clipped=clipped,
            loose=never_too_small(records),
            ordered=foreign and self._text_has_order(),
            fits=known is not None and known.shows_fit(measures.knew),
        )
        causes = self._that_can_be(found)
        findings = [name for name, cause in causes.items() if cause.answer == "found"]
        since, tasks = _since(findings, records, alarms), tuple(models.scores["twin"].tasks)
        effects = self._that_are(models.effects())
        texts = {name: of_text for name, of_text in models.text_effects().items() if name not in self._nothing}
        schemes = artifact.read_plan(mine.quantized).slots()
        said = Said(
            twin="the start model" if self.arm.twin == START else str(self.arm.twin),
            trained=self.arm.trains,
            learning_rate=self.arm.train.learning_rate,
            causes=causes,
            effects={effect.name: effect for effect in effects},
            texts=texts,
            alarms=alarms,
            worst=records,
            scheme=schemes.get(Slot.parse(records[0].tensor)) if records else None,
            since=since,
        )
        return ArmDiagnosis(
            sentence=f"{self.arm.name}: {said}",
            findings=findings,
            causes=causes,
            texts=texts,
            known_text=str(known or ""),
            effects=effects,
            tasks={task: self._that_are(models.effects((task,))) for task in tasks},
            accuracy={task: attribution.accuracies(models.scores, task) for task in tasks},
            perplexity={name: perplexity(nats) for name, nats in models.nats(attribution.HELD_OUT).items()},
            probe=_probe(mine, twin),
            worst_tensors=records[:SHOWN],
            since_step=since,
        )

    def _text_has_order(self) -> bool:
        """Of the held-out text; false, which is said, where it can no longer be read."""
        try:
            tokenizer = load_tokenizer(self.arm.model)
            return has_order(open_data(self.arm.data, tokenizer, self.arm.train.seed).valid.input_ids, tokenizer)
        except InputError as error:
            self.display.on_warning(f"whether the held-out text has order is not known: {error}")
            return False

    def _that_can_be(self, causes: Mapping[str, Cause]) -> dict[str, Cause]:
        """Where nothing was trained nothing was forgotten, and where no scale was carried along none is stale."""
        of_training = () if self.arm.trains else ("saturation", "divergence")
        of_twin = ("forgetting",) if self.arm.twin == START else ()
        return {name: cause for name, cause in causes.items() if name not in (*of_training, *of_twin)}

    def _that_are(self, effects: Sequence[Effect]) -> list[Effect]:
        return [effect for effect in effects if effect.name not in self._nothing]

    @property
    def _nothing(self) -> tuple[str, ...]:
        """Effects from a model to itself."""
        of_training = () if self.arm.trains else ("ptq", "beyond ptq", "quantization")
        return (*of_training, *(("training", "forgetting") if self.arm.twin == START else ()))

    def _check_weights(self, *folders: ArmFolder) -> None:
        """
        Raises:
            DamagedFileError: weights are not those that were scored.
        """
        changed = [text for folder in folders for text in changed_weights(folder, read_json(folder.result, ArmResult))]
        if changed:
            raise DamagedFileError(f"{', '.join(changed)}: train with --resume makes it again")

    def _models(self, mine: ArmFolder, twin: ArmFolder, records: Sequence[TensorRecord]) -> Models:
        """What every model answered and read; those that a diagnosis needs beside the study's are scored here."""
        places = {"start": self.folder.start.eval, "twin": twin.eval, "on": mine.eval}
        plan = artifact.read_plan(mine.quantized)
        fitting, finest = calibrated_plan(plan), finest_plan(plan)
        if self.arm.trains:
            places["off"] = mine.eval_off
            places["ptq"] = self._arm_of(twin, fitting) or self._scored(
                twin, fitting, f"{self.arm.twin} quantized after training"
            )
            places["fresh"] = self._scored(mine, fitting, f"{self.arm.name} with fresh scales", (mine, records))
        else:
            places |= {"off": twin.eval, "ptq": mine.eval}
        texts = {name: load_texts(place) for name, place in places.items()}
        texts["finest"] = load_texts(self._scored(twin, finest, "", answers=False))
        return Models({name: Scores.load(place) for name, place in places.items()}, texts)

    def _arm_of(self, twin: ArmFolder, plan: QuantPlan) -> Path | None:
        """The scores of an arm of the study that is this twin under this plan, calibrated as `_scored` would; None where
        there is none."""
        for arm in self.recipe.arm_by_name.values():
            folder = self.folder.arm(arm.name)
            alike = calibrated_alike(self.folder, arm, twin, self.recipe.diagnose.calibration_sequences)
            if alike and artifact.read_plan(folder.quantized) == plan and not scores_lost(folder):
                return folder.eval
        return None

    def _scored(
        self,
        weights: ArmFolder,
        plan: QuantPlan,
        what: str,
        histograms_of: tuple[ArmFolder, Sequence[TensorRecord]] | None = None,
        *,
        answers: bool = True,
    ) -> Path:
        """Where the scores of these weights under this plan lie, with scales from calibration; scored if not yet.

        Args:
            histograms_of: also write how the inputs of these tensors spread over the grid.
            answers: whether it answers items, too, beside reading the texts.
        """
        place = self._calibrated_place(weights, plan)
        try:
            load_texts(place)
            if answers:
                Scores.load(place)
        except DamagedFileError:  # not scored yet, or torn
            if answers:
                self.display.begin_scoring(what)
            self._score_calibrated(weights, plan, place, histograms_of, answers=answers)
        return place

    def _calibrated_place(self, weights: ArmFolder, plan: QuantPlan) -> Path:
        """Beside the weights; of a twin the same for all arms that differ in how scales are found while training only."""
        asked = self.recipe.diagnose
        settings = [plan.to_dict(), asked.calibration_sequences, *([] if asked.items is None else [asked.items])]
        return weights.eval_calibrated(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest())

    def _score_calibrated(
        self,
        weights: ArmFolder,
        plan: QuantPlan,
        place: Path,
        histograms_of: tuple[ArmFolder, Sequence[TensorRecord]] | None,
        *,
        answers: bool,
    ) -> None:
        tokenizer, batch_size = load_tokenizer(self.arm.model), self.arm.train.micro_batch_size
        known = known_text(self.folder, self.recipe, self.display.on_warning)
        texts = study_texts(self.folder, self.recipe, self.arm, tokenizer, known)
        batches = calibration_batches(self.arm, self.recipe.diagnose.calibration_sequences)
        shown = texts[attribution.HELD_OUT].input_ids[:batch_size]
        opened = partial(_open_calibrated, self.arm, weights, plan, batches, shown, histograms_of)
        score_together(
            opened,
            self.recipe.eval,
            place,
            self.display,
            texts=texts,
            answers=answers,
            at_most=self.recipe.diagnose.items,
        )
        gc.collect()


def _since(findings: Sequence[str], records: Sequence[TensorRecord], alarms: Mapping[str, int]) -> int | None:
    """The first step that showed the first cause."""
    if not findings:
        return None
    if findings[0] == "saturation" and records and records[0].since_step is not None:
        return records[0].since_step
    return alarms.get(findings[0])


def _known(start: ArmFolder) -> KnownText | None:
    try:
        return KnownText.load(start)
    except DamagedFileError:  # a model that writes no text, or a study of an earlier version
        return None


def _open_calibrated(
    arm: Arm,
    weights: ArmFolder,
    plan: QuantPlan,
    batches: Sequence[Tensor],
    shown: Tensor,
    histograms_of: tuple[ArmFolder, Sequence[TensorRecord]] | None,
) -> tuple[Any, Any]:
    """A calibrated model, frozen, and its tokenizer.

    Args:
        shown: [num, seq_len], on which the histograms are of inputs.
    """
    model = calibrated(arm, weights, plan, batches, CalibrationConfig())
    if histograms_of is not None and world().leads:
        write_histograms(model, plan, shown, *histograms_of)
    freeze(model, DTYPES[arm.model.compute_dtype])
    return model, load_tokenizer(arm.model)


def _probe(mine: ArmFolder, twin: ArmFolder) -> dict[str, float]:
    """Model -> KL from the start model at the last probe, nats per token; empty where there was none."""
    of_arm, of_twin = last_probe(mine), last_probe(twin)
    if of_arm is None or of_twin is None or "kl_on" not in of_arm:
        return {}
    return {"start": 0.0, "twin": of_twin["kl_off"], "off": of_arm["kl_off"], "on": of_arm["kl_on"]}
