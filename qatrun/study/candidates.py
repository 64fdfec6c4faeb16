"""What the candidates of an advice lose. Each is made of the start model by calibration, frozen as a recipe's arm is, and
read on held-out text, so that its recipe makes the very model that was measured. Scores are kept as they come."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatrun.data import open_data
from qatrun.errors import InputError, Problem
from qatrun.evaluate.attribution import HELD_OUT, rise
from qatrun.evaluate.text import score_texts
from qatrun.files import read_rows
from qatrun.hardware import answer
from qatrun.layout import START, ArmFolder
from qatrun.model import DTYPES, architecture, load_model, on_device
from qatrun.quant import QuantPlan, calibrated_plan, coverage, freeze, make_plan, survey
from qatrun.recipe import Arm, QatConfig, Recipe, parse_recipe
from qatrun.records.advice import Candidate, ScoredRow
from qatrun.records.scores import TextScore
from qatrun.study.advised_recipe import KINDS, Kind, advised_tree
from qatrun.study.deciding import verdict_of
from qatrun.study.display import ScoringDisplay
from qatrun.study.measuring import saying_what_is_saved, sequences_at_once
from qatrun.study.variants import calibrated
from qatrun.tokenizer import load_tokenizer
from qatrun.train.metrics import RowsFile

MEASURED = "measured.jsonl"
PLAIN = "plain"
LOOKS = len(KINDS) + 1  # intervals that hold together: one of them with some linears kept


@dataclass(frozen=True)
class _Made:
    """A kind's arm and plan."""

    kind: Kind
    arm: Arm
    plan: QuantPlan


class Candidates:
    """One model with its text.

    Attributes:
        num_parameters: of the model, tied ones counted once.
        plain: what it takes without quantization; once anything was measured.
    """

    plain: TextScore

    def __init__(
        self,
        recipe: Recipe,
        arm: Arm,
        num_parameters: int,
        folder: Path,
        display: ScoringDisplay,
        budget: float,
        hardware: str | None,
    ) -> None:
        self.recipe, self.arm, self.folder, self.display = recipe, arm, folder, display
        self.budget, self.hardware, self.num_parameters = budget, hardware, num_parameters
        data = open_data(arm.data, load_tokenizer(arm.model), arm.train.seed)
        if len(data.valid.input_ids) < 2:
            raise InputError(Problem("an interval needs two sequences or more", "data.valid_sequences"))
        self._empty = architecture(arm.model)
        self._seen = survey(self._empty)
        self._at_once = sequences_at_once(arm, self._empty)
        sequences = (arm.qat or QatConfig()).calibrating.sequences  # each candidate's own are the same
        self._calibration, self._held_out = data.train.take(sequences).input_ids, data.valid

    def tree(self, kind: Kind, *, trains: bool) -> dict[str, Any]:
        """A recipe of that kind, see `advised_tree`."""
        return advised_tree(self.recipe, self.arm, kind, self.budget, self.hardware, trains=trains)

    def measured(self, kinds: Sequence[Kind]) -> list[Candidate]:
        """Of each kind; what an earlier run measured is taken as it is."""
        made = {kind.name: self._made(kind) for kind in kinds}
        with saying_what_is_saved(self.display):
            scores = self._scores([each for each in made.values() if isinstance(each, _Made)])
        self.plain = scores[PLAIN]
        return [self._candidate(kind, made[kind.name], scores.get(kind.name)) for kind in kinds]

    def _made(self, kind: Kind) -> _Made | str:
        """Or why there is none."""
        try:
            arm = parse_recipe(self.tree(kind, trains=False)).arm_by_name[kind.format]
            assert arm.qat is not None
            plan = make_plan(self._empty, arm.qat, self._seen)
        except InputError as error:
            return error.problems[0].message
        return _Made(kind, arm, calibrated_plan(plan, keeps_unscaled=True))

    def _scores(self, made: Sequence[_Made]) -> dict[str, TextScore]:
        """Of the plain model and of each candidate."""
        file = self.folder / MEASURED
        rows = read_rows(file, ScoredRow, skip_damaged=True) if file.is_file() else []
        before = {(row.name, *row.kept): row.score for row in rows}
        scores: dict[str, TextScore] = {}
        with closing(RowsFile(file, [row.to_dict() for row in rows])) as written:
            for number, each in enumerate((None, *made), start=1):
                name, kept = (PLAIN, ()) if each is None else (each.kind.name, each.kind.kept)
                score = before.get((name, *kept))
                if score is None:
                    self.display.begin_scoring(f"{name} on held-out text")
                    score = self._score(each)
                    written.append(ScoredRow(name=name, kept=list(kept), score=score).to_dict())
                scores[name] = score
                self.display.on_scored("candidates", number, len(made) + 1)
        return scores

    def _score(self, made: _Made | None) -> TextScore:
        dtype = DTYPES[self.arm.model.compute_dtype]
        if made is None:
            model: Any = on_device(load_model(self.arm.model, dtype))
        else:
            assert made.arm.qat is not None
            how = made.arm.qat.calibrating
            batches = self._calibration.split(self._at_once)
            if all(scheme.per_row for scheme in made.plan.slots().values()) and how.smooth is None:
                batches = batches[:1]  # every scale is found from the tensor at hand
            model = calibrated(made.arm, ArmFolder(Path(START)), made.plan, batches, how)
            freeze(model, dtype)
        return score_texts(model, {HELD_OUT: self._held_out}, batch_size=self._at_once).texts[HELD_OUT]

    def _candidate(self, kind: Kind, made: _Made | str, score: TextScore | None) -> Candidate:
        known: dict[str, Any] = {"weight_bytes": None, "nats": None, "ci95": None, "verdict": None}
        known |= {"runs": None, "why": made if isinstance(made, str) else ""}
        if isinstance(made, _Made) and score is not None:
            rate = rise(self.plain, score)
            interval = list(rate.interval(1 - 0.05 / LOOKS))
            covered = coverage(self._empty, made.plan, self._seen)
            known["weight_bytes"] = 2 * self.num_parameters - covered.quantized_weights
            known |= {"nats": rate.mean, "ci95": interval, "verdict": verdict_of(interval, self.budget)}
            if self.hardware is not None:
                assert made.arm.qat is not None
                here = answer(self.hardware, made.arm.qat.schemes["weight"], made.arm.qat.schemes["input"])
                known |= {"runs": here.runs, "why": "" if here.is_native else here.why}
        return Candidate(
            name=kind.name,
            format=kind.format,
            weight=kind.weight,
            input=kind.input,
            calibration=dict(kind.calibration),
            kept=list(kind.kept),
            **known,
        )
