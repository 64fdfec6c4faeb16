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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from qatrun import artifact
from qatrun.data import open_data
from qatrun.errors import InputError, Problem
from qatrun.evaluate import attribution
from qatrun.evaluate.attribution import Effect
from qatrun.evaluate.harness import score
from qatrun.evaluate.perplexity import perplexity
from qatrun.evaluate.scores import SUMMARY_FILE, Scores
from qatrun.model import DTYPES
from qatrun.quant import QuantPlan, freeze
from qatrun.recipe import Arm, Recipe, load_recipe
from qatrun.study.evidence import DIAGNOSIS_FILE
from qatrun.study.layout import ArmFolder, StudyFolder, read_json, write_json
from qatrun.study.records import SHOWN, TensorRecord, clipping_limit, first_alarms, last_probe, tensor_records
from qatrun.study.variants import calibrated, calibrated_plan, calibration_batches, input_histograms
from qatrun.tokenizer import load_tokenizer
from qatrun.train.alarms import RESOLUTION_REMEDY, saturation_remedy


class ScoringDisplay(Protocol):
    """Who is told how scoring goes."""

    def begin_scoring(self, what: str) -> None: ...

    def on_scored(self, task: str, done: int, total: int) -> None: ...


def diagnose(folder: StudyFolder, display: ScoringDisplay) -> dict[str, Any]:
    """Diagnose every quantized arm of a finished study that has a twin; plain data, also written to diagnosis.json.

    Raises:
        InputError: no finished study there, or no arm to diagnose.
    """
    if not folder.recipe.is_file() or not folder.comparison.is_file():
        raise InputError(Problem(f"no finished study in {folder.path}", "study"))
    recipe = load_recipe(folder.recipe)
    arms = [recipe.resolve_arm(name) for name in recipe.arm_names]
    found = {arm.name: _Diagnosis(folder, recipe, arm, display).run() for arm in arms if arm.twin is not None}
    if not found:
        raise InputError(Problem(f"{folder.path} has no quantized arm with a BF16 twin to diagnose", "study"))
    worst = max(found.values(), key=lambda arm: len(arm["findings"]))
    result = {"sentence": worst["sentence"], "arms": found}
    write_json(folder.path / DIAGNOSIS_FILE, result)
    return result


@dataclass
class _Diagnosis:
    """One arm's."""

    folder: StudyFolder
    recipe: Recipe
    arm: Arm
    display: ScoringDisplay

    def run(self) -> dict[str, Any]:
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
        return {
            "sentence": f"{self.arm.name}: {self._sentence(causes, effects, records, since)}",
            "findings": list(causes),
            "effects": [effect.to_dict() for effect in effects.values()],
            "tasks": {
                task: [e.to_dict() for e in attribution.effects(models, log_perplexity, (task,)).values()]
                for task in models["twin"].tasks
            },
            "accuracy": {
                task: {name: scores.tasks[task].accuracy for name, scores in models.items()}
                for task in models["twin"].tasks
            },
            "perplexity": {name: math.exp(value) for name, value in log_perplexity.items()},
            "probe": _probe(mine, twin),
            "worst_tensors": [asdict(record) for record in records[:SHOWN]],
            "since_step": since,
        }

    def _known_perplexities(self, mine: ArmFolder, twin: ArmFolder) -> dict[str, float]:
        of_arm = read_json(mine.result)["perplexity"]
        values = {
            "start": read_json(self.folder.start.result)["perplexity"]["on"],
            "twin": read_json(twin.result)["perplexity"]["on"],
            "on": of_arm["on"],
            "off": of_arm["off"],
        }
        return {name: math.log(value) for name, value in values.items()}

    def _score_variants(self, mine: ArmFolder, twin: ArmFolder, records: Sequence[TensorRecord]) -> dict[str, float]:
        """Score the two calibrated models where that has not been done; their log-perplexities."""
        values: dict[str, float] = {}
        for name, weights, what in (
            ("ptq", twin, f"{self.arm.twin} quantized after training"),
            ("fresh", mine, f"{self.arm.name} with fresh scales"),
        ):
            place = self._calibrated_place(mine, weights)
            file = place / "log_perplexity.json"
            if not (file.is_file() and (place / SUMMARY_FILE).is_file()):
                self.display.begin_scoring(what)
                histograms = records if name == "fresh" else ()
                write_json(file, self._score_calibrated(mine, weights, place, histograms))
            values[name] = read_json(file)
        return values

    def _calibrated_place(self, mine: ArmFolder, weights: ArmFolder) -> Path:
        """Beside the weights; of a twin the same for all arms that differ in how scales are found while training only."""
        settings = [calibrated_plan(_plan(mine)).to_dict(), self.recipe.diagnose.calibration_sequences]
        return (
            weights.path
            / f"eval-calibrated-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"
        )

    def _score_calibrated(
        self, mine: ArmFolder, weights: ArmFolder, place: Path, records: Sequence[TensorRecord]
    ) -> float:
        plan = _plan(mine)
        tokenizer = load_tokenizer(self.arm.model)
        batches = calibration_batches(self.arm, tokenizer, self.recipe.diagnose.calibration_sequences)
        valid = open_data(self.arm.data, tokenizer, self.arm.train.seed).valid
        model = calibrated(self.arm, weights, plan, batches)
        scales = {r.linear: r.scale for r in records if r.role == "input" and r.scale is not None}
        if scales:
            shown = dict(list(scales.items())[:SHOWN])
            tensors = input_histograms(model, valid.input_ids[: self.arm.train.micro_batch_size], shown, plan)
            write_json(mine.path / "histograms.json", {"tensors": tensors})
        freeze(model, DTYPES[self.arm.model.compute_dtype])
        score(model, tokenizer, self.recipe.eval, output_dir=place, on_progress=self.display.on_scored)
        found = perplexity(model, valid.input_ids, batch_size=self.recipe.eval.batch_size, labels=valid.labels)
        del model
        gc.collect()
        return found.nll_mean

    def _alarms(self) -> dict[str, int]:
        return first_alarms(self.folder.arm(self.arm.name).path)

    def _since(self, causes: Sequence[str], records: Sequence[TensorRecord]) -> int | None:
        """The first step that showed the first cause."""
        if not causes:
            return None
        if causes[0] == "saturation" and records and records[0].since_step is not None:
            return records[0].since_step
        return self._alarms().get(causes[0])

    def _sentence(
        self,
        causes: Sequence[str],
        effects: Mapping[str, Effect],
        records: Sequence[TensorRecord],
        since: int | None,
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
                f"start model; lower train.learning_rate ({self.arm.train.learning_rate:g})"
            ),
            "saturation": lambda: (
                f"scales saturate: quantization costs {_cost(effects['whole'], text=True)}, of which fitting scales "
                f"would cost {_cost(effects['ptq'], text=True)}; {_worst(records, by_clipping=True)}"
                f"{saturation_remedy(self.arm.qat, records[0].role, records[0].overshoot) if records else ''}"
            ),
            "resolution": lambda: (
                f"the grid is too coarse: even fitting scales cost {_cost(effects['ptq'])}; "
                f"{_worst(records, by_clipping=False)}{RESOLUTION_REMEDY}"
            ),
            "divergence": lambda: (
                f"training under quantization ended {_cost(effects['whole'])} below {self.arm.twin}, which neither "
                "clipping nor the grid explains; compare more seeds (train.seeds) before blaming the format"
            ),
        }
        return "; and ".join(say[cause]() for cause in causes) + step


def _probe(mine: ArmFolder, twin: ArmFolder) -> dict[str, float]:
    """Model -> KL from the start model at the last probe, nats per token; empty where there was none."""
    of_arm, of_twin = last_probe(mine.path), last_probe(twin.path)
    if of_arm is None or of_twin is None or "kl_on" not in of_arm:
        return {}
    return {"start": 0.0, "twin": of_twin["kl_off"], "off": of_arm["kl_off"], "on": of_arm["kl_on"]}


def _plan(arm: ArmFolder) -> QuantPlan:
    return QuantPlan.from_dict(read_json(arm.quantized / artifact.PLAN_FILE)["plan"])


def _cost(effect: Effect, *, text: bool = False) -> str:
    low, high = effect.ci95_pp
    of_text = f", {effect.drop_text_nats:.3f} a token of its text" if text else ""
    return f"{effect.drop_pp:.1f} pp [{low:.1f}, {high:.1f}] ({effect.drop_nats:.3f} nats an answer{of_text})"


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
