"""`qatrun diagnose`: what a drop is made of, what broke, where, since when and what to change.

Two more models are scored for each quantized arm, its twin quantized after training (PTQ) and the arm with fresh scales;
`evaluate.attribution` holds the rule. What is scored already is not scored again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qatrun import advice
from qatrun.data import open_data
from qatrun.errors import DamagedFileError, InputError, Problem
from qatrun.evaluate import attribution
from qatrun.evaluate.harness import score
from qatrun.evaluate.perplexity import mean_nll
from qatrun.evaluate.scores import Scores
from qatrun.export import artifact
from qatrun.files import read_json, write_json
from qatrun.layout import LOG_PERPLEXITY_FILE, ArmFolder, StudyFolder
from qatrun.model import DTYPES
from qatrun.quant import calibrated_plan, freeze, input_histograms
from qatrun.recipe import Arm, Recipe, load_recipe
from qatrun.records.diagnosis import ArmDiagnosis, Effect, StudyDiagnosis, TensorRecord
from qatrun.records.training import ArmResult, Result
from qatrun.scheme import Slot
from qatrun.study.display import ScoringDisplay
from qatrun.study.doneness import changed_weights
from qatrun.study.inputs import check_inputs
from qatrun.study.records import SHOWN, clipping_limit, first_alarms, last_probe, tensor_records
from qatrun.study.variants import calibrated
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
        log_perplexity = self._known_perplexities(mine, twin) | self._score_variants(mine, twin, records)
        places = {
            "start": self.folder.start.eval,
            "twin": twin.eval,
            "on": mine.eval,
            "off": mine.eval_off,
            "ptq": self._calibrated_place(mine, twin),
            "fresh": self._calibrated_place(mine, mine),
        }
        models = {name: Scores.load(place) for name, place in places.items()}
        effects = attribution.effects(models, log_perplexity)
        limit = clipping_limit(self.recipe.monitor.alarms)
        clipped = any(record.clip_fraction > limit for record in records) or "saturation" in self._alarms()
        causes = attribution.findings(effects, clipped=clipped)
        since = self._since(causes, records)
        tasks = tuple(models["twin"].tasks)
        return ArmDiagnosis(
            sentence=f"{self.arm.name}: {self._sentence(causes, effects, records, since)}",
            findings=list(causes),
            effects=list(effects.values()),
            tasks={task: list(attribution.effects(models, log_perplexity, (task,)).values()) for task in tasks},
            accuracy={task: attribution.accuracies(models, task) for task in tasks},
            perplexity={name: math.exp(value) for name, value in log_perplexity.items()},
            probe=_probe(mine, twin),
            worst_tensors=records[:SHOWN],
            since_step=since,
        )

    def _known_perplexities(self, mine: ArmFolder, twin: ArmFolder) -> dict[str, float]:
        places = {"start": (self.folder.start, "on"), "twin": (twin, "on"), "on": (mine, "on"), "off": (mine, "off")}
        return {name: math.log(_perplexity(*place)) for name, place in places.items()}

    def _score_variants(self, mine: ArmFolder, twin: ArmFolder, records: Sequence[TensorRecord]) -> dict[str, float]:
        """Score the two calibrated models where that has not been done; their log-perplexities."""
        values: dict[str, float] = {}
        for name, weights, what in (
            ("ptq", twin, f"{self.arm.twin} quantized after training"),
            ("fresh", mine, f"{self.arm.name} with fresh scales"),
        ):
            place = self._calibrated_place(mine, weights)
            file = place / LOG_PERPLEXITY_FILE
            try:
                Scores.load(place)
                values[name] = read_json(file, float)
            except DamagedFileError:  # not scored yet, or torn
                self.display.begin_scoring(what)
                histograms = records if name == "fresh" else ()
                values[name] = self._score_calibrated(mine, weights, place, histograms)
                write_json(file, values[name])
        return values

    def _calibrated_place(self, mine: ArmFolder, weights: ArmFolder) -> Path:
        """Beside the weights; of a twin the same for all arms that differ in how scales are found while training only."""
        asked = self.recipe.diagnose
        plan = calibrated_plan(artifact.read_plan(mine.quantized))
        settings = [plan.to_dict(), asked.calibration_sequences, *([] if asked.items is None else [asked.items])]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return weights.eval_calibrated(digest)

    def _score_calibrated(
        self, mine: ArmFolder, weights: ArmFolder, place: Path, records: Sequence[TensorRecord]
    ) -> float:
        check_inputs(self.folder, self.recipe)
        if changed := changed_weights(weights, read_json(weights.result, ArmResult)):
            raise DamagedFileError(f"{', '.join(changed)}: train with --resume makes it again")
        plan = artifact.read_plan(mine.quantized)
        tokenizer = load_tokenizer(self.arm.model)
        data, batch_size = open_data(self.arm.data, tokenizer, self.arm.train.seed), self.arm.train.micro_batch_size
        sequences, valid = data.train.take(self.recipe.diagnose.calibration_sequences).input_ids, data.valid
        model = calibrated(self.arm, weights, plan, sequences.split(batch_size))
        slots = [(Slot.parse(record.tensor), record.scale) for record in records]
        scales = {slot.linear: scale for slot, scale in slots if slot.role == "input" and scale is not None}
        if scales:
            shown = dict(list(scales.items())[:SHOWN])
            tensors = input_histograms(model, valid.input_ids[:batch_size], shown, plan)
            write_json(mine.histograms, {"tensors": tensors})
        freeze(model, DTYPES[self.arm.model.compute_dtype])
        items = self.recipe.diagnose.items
        score(model, tokenizer, self.recipe.eval, output_dir=place, on_progress=self.display.on_scored, at_most=items)
        nats = mean_nll(model, valid.input_ids, batch_size=self.recipe.eval.batch_size, labels=valid.labels)
        del model
        gc.collect()
        return nats

    def _alarms(self) -> dict[str, int]:
        return first_alarms(self.folder.arm(self.arm.name))

    def _since(self, causes: Sequence[str], records: Sequence[TensorRecord]) -> int | None:
        """The first step that showed the first cause."""
        if not causes:
            return None
        if causes[0] == "saturation" and records and records[0].since_step is not None:
            return records[0].since_step
        return self._alarms().get(causes[0])

    def _sentence(
        self, causes: Sequence[str], effects: Mapping[str, Effect], records: Sequence[TensorRecord], since: int | None
    ) -> str:
        if not causes:
            alarms = ", ".join(f"{kind} at step {step}" for kind, step in self._alarms().items())
            return (
                f"nothing broke: quantization costs {_cost(effects['whole'])} against {self.arm.twin}, training "
                f"{_cost(effects['training'])} against the start model"
                + (f"; its alarms ({alarms}) left no mark on these scores" if alarms else "")
            )
        step = f" since about step {since}" if since is not None else ""
        say: Mapping[str, Callable[[], str]] = {
            "forgetting": lambda: (
                f"training forgot: {self.arm.twin}, without any quantizer, is {_cost(effects['training'])} below the "
                f"start model; {advice.FORGETTING} ({self.arm.train.learning_rate:g})"
            ),
            "saturation": lambda: (
                f"scales saturate: quantization costs {_cost(effects['whole'], text=True)}, of which fitting scales "
                f"would cost {_cost(effects['ptq'], text=True)}; {_worst(records, by_clipping=True)}"
                f"{self._against_saturation(records[0]) if records else ''}"
            ),
            "resolution": lambda: (
                f"the grid is too coarse: even fitting scales cost {_cost(effects['ptq'])}; "
                f"{_worst(records, by_clipping=False)}{advice.RESOLUTION}"
            ),
            "divergence": lambda: (
                f"training under quantization ended {_cost(effects['whole'])} below {self.arm.twin}, which neither "
                "clipping nor the grid explains; compare more seeds (train.seeds) before blaming the format"
            ),
        }
        return "; and ".join(say[cause]() for cause in causes) + step

    def _against_saturation(self, worst: TensorRecord) -> str:
        schemes = artifact.read_plan(self.folder.arm(self.arm.name).quantized).slots()
        return advice.against_saturation(schemes.get(Slot.parse(worst.tensor)), worst.overshoot)


def _probe(mine: ArmFolder, twin: ArmFolder) -> dict[str, float]:
    """Model -> KL from the start model at the last probe, nats per token; empty where there was none."""
    of_arm, of_twin = last_probe(mine), last_probe(twin)
    if of_arm is None or of_twin is None or "kl_on" not in of_arm:
        return {}
    return {"start": 0.0, "twin": of_twin["kl_off"], "off": of_arm["kl_off"], "on": of_arm["kl_on"]}


def _perplexity(folder: ArmFolder, quantizers: str) -> float:
    value = read_json(folder.result, Result).perplexity.get(quantizers, 0.0)
    if not value > 0:
        raise DamagedFileError(f"{folder.result} says no perplexity with quantizers {quantizers}")
    return value


def _cost(effect: Effect, *, text: bool = False) -> str:
    low, high = effect.ci95_pp
    of_text = f", {effect.text_loglikelihood:.3f} a token of its text" if text else ""
    return f"{effect.drop_pp:.1f} pp [{low:.1f}, {high:.1f}] ({effect.loglikelihood:.3f} nats an answer{of_text})"


def _worst(records: Sequence[TensorRecord], *, by_clipping: bool) -> str:
    if not records:
        return ""
    if by_clipping:
        worst = records[0]
        return (
            f"worst {worst.tensor} clips {100 * worst.clip_fraction:.2g} % (overshoot up to {worst.overshoot:.1f}x): "
        )
    measured = [record for record in records if record.sqnr_db is not None]
    if not measured:
        return ""
    coarsest = min(measured, key=lambda record: record.sqnr_db or math.inf)
    return f"worst {coarsest.tensor} keeps {coarsest.sqnr_db:.1f} dB: "
