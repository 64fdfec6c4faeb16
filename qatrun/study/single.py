"""The study of one seed: start model, trunks, arms, scores, comparison. Each part is done once and kept, so that a resume
goes on with the first part that is missing."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qatrun.data import Batch, open_data
from qatrun.errors import DamagedFileError
from qatrun.evaluate.attribution import HELD_OUT, KNOWN, knew
from qatrun.evaluate.text import load_texts, perplexity
from qatrun.export import artifact
from qatrun.files import filled_folder, read_json, write_json
from qatrun.layout import ArmFolder, StudyFolder
from qatrun.model import DTYPES, save_model
from qatrun.quant import QuantPlan, freeze
from qatrun.recipe import Arm, EvalConfig
from qatrun.records.comparison import Cost
from qatrun.records.environment import Environment
from qatrun.records.training import ArmResult, Match, Outcome, Result
from qatrun.study.calibrating import Source, calibrate_arm, is_of_other_weights
from qatrun.study.card import write_cards
from qatrun.study.checking import Preflight
from qatrun.study.diagnose import diagnose
from qatrun.study.display import Display
from qatrun.study.doneness import finished, scores_lost, weights_of
from qatrun.study.evidence import summarize
from qatrun.study.exporting import export_trained
from qatrun.study.inputs import check_inputs
from qatrun.study.joint import Opener, open_plain, score_together, train_together
from qatrun.study.known_text import KNOWN_TEXT, KnownText, known_text
from qatrun.study.over_ptq import over_ptq
from qatrun.study.pairs import compare_arms
from qatrun.study.records import read_losses
from qatrun.study.results import StudyResult, write_comparison, write_summary, write_text
from qatrun.study.segments import ArmSegments, matched_settings, plan_segments
from qatrun.study.stages import planned_stages
from qatrun.study.texts import LOOKED_AT, has_order, study_texts
from qatrun.study.variants import calibration_batches
from qatrun.text import readable_size
from qatrun.tokenizer import load_tokenizer
from qatrun.train.checkpoint import has_checkpoint
from qatrun.train.segment import Segment, Watched


def run_single(checked: Preflight, folder: StudyFolder, display: Display, trackers: Sequence[str]) -> StudyResult:
    """Run a recipe without seeds, whose preflight has no problems, in a folder that is claimed and locked."""
    recipe, study = checked.recipe, _Study(checked, folder, display, trackers)
    segments_of_arms = plan_segments(checked.arms, checked.plans, folder.path)
    display.begin_study(planned_stages(recipe, checked.arms, segments_of_arms))
    study.keep_known_text()
    study.score_start_model()
    for segments in segments_of_arms:
        study.finish_arm(segments.own.arm, segments)
    for arm in checked.arms.values():
        if not arm.trains:  # once what it is made from is there
            study.finish_arm(arm, None)
    result = study.compare()
    if recipe.diagnose.at_end and result.pairs:
        result = replace(result, diagnosis=diagnose(folder, display))
        write_text(folder, result)
    if recipe.contrasts:
        result = study.answer_contrasts(result)
    write_cards(folder)
    return result


class _Study:
    def __init__(self, checked: Preflight, folder: StudyFolder, display: Display, trackers: Sequence[str]) -> None:
        self.checked, self.folder, self.display, self.trackers = checked, folder, display, trackers
        self.recipe = checked.recipe
        self.known: KnownText | None = None

    def score_start_model(self) -> None:
        """Score the model before training, so that what all arms lost shows."""
        arm = self.checked.arms[self.recipe.arm_names[0]]
        record = self.folder.start
        if record.result.is_file() and not (lost := scores_lost(record)):
            return
        if record.result.is_file():
            self.display.on_warning(f"start model: scored again, because {lost}")
        tokenizer = load_tokenizer(arm.model)
        opened = partial(open_plain, arm.model, arm.model.compute_dtype)
        texts = study_texts(self.folder, self.recipe, arm, tokenizer, self.known)
        value = self._score(opened, texts, record.eval, "start model")
        write_json(record.result, Result(arm="start", perplexity={"on": value}))

    def keep_known_text(self) -> None:
        """Choose, while there is only the start model, on what text a rise of the loss is forgetting."""
        self.display.begin_reading(KNOWN_TEXT)
        self.known = known_text(self.folder, self.recipe, self.display.on_warning)

    def finish_arm(self, arm: Arm, segments: ArmSegments | None) -> None:
        """Train an arm, its trunk first, or calibrate it where it has no segments; export and score it. What is there
        already, and whole, is left as it is."""
        folder = self.folder.arm(arm.name)
        record = finished(folder, self.display)
        if record is not None and segments is None and is_of_other_weights(record, Source.of(arm, self.folder)):
            self.display.on_warning(f"{arm.name}: made again, because {arm.twin} was")
            record = None
        if record is None:
            record = self._calibrate(arm, folder) if segments is None else self._train_and_export(segments, folder)
        elif not (lost := scores_lost(folder)):
            self.display.note(f"{arm.name}: done already")
            export_trained(arm, folder, self.recipe.eval, self.display)
            return
        else:
            self.display.on_warning(f"{arm.name}: scored again, because {lost}")
        texts = study_texts(self.folder, self.recipe, arm, load_tokenizer(arm.model), self.known)
        perplexities = self._score_arm(arm, folder, texts)
        write_json(folder.result, record.model_copy(update={"perplexity": perplexities}))
        export_trained(arm, folder, self.recipe.eval, self.display)

    def _train_and_export(self, segments: ArmSegments, folder: ArmFolder) -> ArmResult:
        """From the newest checkpoints on; the record of the arm, without perplexities."""
        arm, own, trunk = segments.own.arm, segments.own, segments.trunk
        if trunk is not None and not has_checkpoint(folder.checkpoints):
            self._train_trunk(trunk)
        model, outcome = self._train(own, keep=True)
        sizes = self._export(model, arm, own.plan, folder)
        del model
        gc.collect()
        match: Any = {**matched_settings(arm), "data_hash": outcome.data_hash}
        cost = Cost(seconds=outcome.seconds, peak_memory_bytes=outcome.peak_memory_bytes)
        return self._record(arm, match, cost, sizes)

    def _calibrate(self, arm: Arm, folder: ArmFolder) -> ArmResult:
        """Without a step of training; the record of the arm, without perplexities."""
        check_inputs(self.folder, self.recipe)
        source, plan = Source.of(arm, self.folder), self.checked.plans[arm.name]
        assert plan is not None
        model, cost = calibrate_arm(arm, source, plan, folder, self.display)
        sizes = self._export(model, arm, plan, folder)
        del model
        gc.collect()
        record = self._record(arm, source.match, cost, sizes)
        return record.model_copy(update={"method": arm.method, "made_from": source.weights})

    def _train_trunk(self, trunk: Segment) -> None:
        """Train a trunk unless that is done; once more where its checkpoints are damaged, which gives the same."""
        folder = ArmFolder(trunk.folder)
        result = folder.result
        try:
            read_json(result, Outcome)
            if has_checkpoint(folder.checkpoints):
                return
            self.display.on_warning(f"{trunk.folder} holds no whole checkpoint to branch from: trained again")
        except DamagedFileError as error:
            if result.is_file():
                self.display.on_warning(f"{error}; made again")
        outcome = self._train(trunk, keep=False)[1]
        gc.collect()  # the trunk's model: it would count towards the first arm's peak memory
        write_json(result, outcome)

    def compare(self) -> StudyResult:
        """Compare every quantized arm with its twin, and keep what comes out."""
        pairs = tuple(
            compare_arms(self.folder.arm(arm.twin), self.folder.arm(name), self.folder.start, self.recipe.budget)
            for name, arm in self.checked.arms.items()
            if arm.twin is not None
        )
        result = StudyResult(self.folder.path, pairs, over_ptq=over_ptq(self.recipe, [self.folder]))
        write_comparison(self.folder, result)
        matches = {name: read_json(self.folder.arm(name).result, ArmResult).match for name in self.checked.arms}
        arms = {name: {"seed": match["seed"], "data_hash": match["data_hash"]} for name, match in matches.items()}
        environment = read_json(self.folder.environment, Environment)
        write_json(self.folder.environment, environment.model_copy(update={"arms": arms}))
        return result

    def answer_contrasts(self, result: StudyResult) -> StudyResult:
        """Answer them once the diagnosis is there, whose findings stand beside them, and add them to the comparison."""
        summary = summarize(self.folder.name, self.recipe, {self.recipe.train.seed: self.folder})
        answered = replace(result, summary=summary)
        write_summary(self.folder, summary)
        write_comparison(self.folder, answered)
        return answered

    def _train(self, segment: Segment, *, keep: bool) -> tuple[Any, Outcome]:
        arm = segment.arm
        check_inputs(self.folder, self.recipe)
        tokenizer = load_tokenizer(arm.model)
        data = open_data(arm.data, tokenizer, arm.train.seed)
        if segment.quantizes and arm.qat is not None and arm.qat.init == "ptq":
            batches = calibration_batches(arm, arm.qat.calibrating.sequences)
            segment = replace(segment, calibration=batches)
        first_step = segment.arm.warmup.steps if segment.trunk is not None else 0
        twin = {} if arm.twin is None else read_losses(self.folder.arm(arm.twin))
        self.display.begin_training(segment.name, first_step, segment.last_step, twin)
        return train_together(
            segment,
            data.train,
            self.display,
            self.trackers,
            *self._watched(arm, segment.trunk is None and has_order(data.train.peek(LOOKED_AT), tokenizer)),
            keep=keep,
        )

    def _watched(self, arm: Arm, ordered: bool) -> tuple[Watched, EvalConfig | None]:
        """The probe's text, what the first loss is held against, and what the probe's mini-benchmark asks.

        Args:
            ordered: whether the first step's text is known to have order; nobody asks of a segment that begins later.
        """
        probe, known, valid = arm.monitor.probe, self.known, arm.data.valid
        same_source = valid is None or valid.path == arm.data.train.path
        nll = math.log(read_json(self.folder.start.result, Result).perplexity["on"]) if same_source else None
        watched = Watched(held_out_nll=nll, ordered=ordered, fits=ordered and self._tokenizer_fits())
        if probe is None or known is None:
            return watched, None
        few = self.recipe.eval.model_copy(update={"limit": probe.items})
        return replace(watched, text=known.input_ids[: probe.sequences]), None if probe.items is None else few

    def _tokenizer_fits(self) -> bool:
        """Whether it is known to be the start model's."""
        if self.known is None:
            return False
        read = load_texts(self.folder.start.eval).texts.get(KNOWN)
        return self.known.shows_fit(read is not None and knew(read))

    def _export(self, model: Any, arm: Arm, plan: QuantPlan | None, folder: ArmFolder) -> dict[str, int]:
        """Write the plain folder and, for a quantized arm, the quantized one; returns the sizes of their weights."""
        dtype, tokenizer = DTYPES[arm.model.compute_dtype], load_tokenizer(arm.model)
        with filled_folder(folder.path):
            save_model(model, tokenizer, folder.path, dtype)
        sizes = {"plain_bytes": artifact.size_bytes(folder.path)}
        if plan is not None:
            freeze(model, dtype)
            artifact.save(model, tokenizer, plan, folder.quantized)
            sizes["quantized_bytes"] = artifact.size_bytes(folder.quantized)
        shown = ", ".join(f"{name.removesuffix('_bytes')} {readable_size(size)}" for name, size in sizes.items())
        self.display.note(f"{arm.name}: saved to {folder.path} ({shown})")
        return sizes

    def _score_arm(self, arm: Arm, folder: ArmFolder, texts: Mapping[str, Batch]) -> dict[str, float]:
        """Score what was saved, read back. Returns perplexities with quantizers on (or of a BF16 arm) and, where that is not
        what its twin has been scored as, off."""
        plain = arm.model.model_copy(update={"path": str(folder.path), "revision": None})
        values: dict[str, float] = {}
        state, place, what = "on", folder.eval, arm.name
        if arm.qat is not None:
            opened = partial(artifact.load, folder.path, trust_remote_code=arm.model.trust_remote_code)
            values["on"] = self._score(opened, texts, folder.eval, f"{arm.name}, quantizers on")
            if not arm.trains:
                return values
            state, place, what = "off", folder.eval_off, f"{arm.name}, quantizers off"
        return values | {state: self._score(partial(open_plain, plain, arm.model.compute_dtype), texts, place, what)}

    def _score(self, opened: Opener, texts: Mapping[str, Batch], output: Path, what: str) -> float:
        """Returns the perplexity of held-out text."""
        self.display.begin_scoring(what)
        scores, read = score_together(opened, self.recipe.eval, output, self.display, texts=texts)
        found = perplexity(read.texts[HELD_OUT].mean)
        accuracies = [f"{name} {100 * score.accuracy:.2f}" for name, score in scores.tasks.items()]
        self.display.note(f"{what}: {', '.join([*accuracies, f'perplexity {found:.4g}'])}")
        return found

    def _record(self, arm: Arm, match: Match, cost: Cost, sizes: Mapping[str, int]) -> ArmResult:
        covered = self.checked.coverages.get(arm.name)
        return ArmResult(
            arm=arm.name,
            twin=arm.twin,
            match=match,
            cost=cost,
            coverage=str(covered) if covered is not None else None,
            perplexity={},
            sizes=dict(sizes),
            weights=weights_of(self.folder.arm(arm.name)),
        )
