"""A recipe to its result: start model, trunks, arms, scores, comparison. Each part is done once and kept, so that a
resume goes on with the first part that is missing."""

from __future__ import annotations

import csv
import gc
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from qatrun import artifact
from qatrun.data import Batch, open_data
from qatrun.errors import InputError, Problem
from qatrun.evaluate.harness import score
from qatrun.evaluate.perplexity import perplexity
from qatrun.evaluate.scores import replace_file
from qatrun.model import DTYPES, load_model, load_tokenizer, save_model
from qatrun.quant import freeze
from qatrun.recipe import Arm, Recipe, load_recipe
from qatrun.report import TerminalDisplay, comparison_text, readable_size
from qatrun.study.environment import describe_environment
from qatrun.study.layout import ArmFolder, StudyFolder, read_json, write_json
from qatrun.study.pairs import Pair, compare_arms, matched_settings
from qatrun.study.preflight import Preflight, preflight, tracker_problems
from qatrun.study.segments import ArmSegments, plan_segments
from qatrun.train import Listener, Outcome, Segment, train


class Display(Listener, Protocol):
    """Who is told how a study goes."""

    def begin_training(self, segment: str, first_step: int, last_step: int) -> None:
        """A segment starts, or goes on."""

    def begin_scoring(self, what: str) -> None:
        """A model is about to be scored."""

    def on_scored(self, task: str, done: int, total: int) -> None:
        """Requests of a task answered so far."""

    def note(self, text: str) -> None:
        """One line on what was done."""


@dataclass(frozen=True)
class StudyResult:
    """A finished study. `pairs` holds one comparison for each quantized arm that has a twin."""

    folder: Path
    pairs: tuple[Pair, ...]

    @property
    def verdict(self) -> str | None:
        """The worst of the arms: within, inconclusive or exceeds; None where no arm has a twin."""
        order = ("within", "inconclusive", "exceeds")
        return max((pair.comparison.verdict for pair in self.pairs), key=order.index, default=None)


def run(
    recipe: str | Path | Recipe, overrides: Sequence[str] = (), *, resume: bool = False, overwrite: bool = False
) -> StudyResult:
    """What `qatrun train` does, shown on the terminal: a recipe file, a shipped name or a recipe made in Python.

    Raises:
        as `load_recipe` and `run_study`.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    with TerminalDisplay(Console()) as display:
        return run_study(loaded, display, resume=resume, overwrite=overwrite)


def run_study(
    recipe: Recipe, display: Display, *, resume: bool = False, overwrite: bool = False, trackers: Sequence[str] = ()
) -> StudyResult:
    """Run a recipe from start to comparison.

    Args:
        resume: go on with a study of the same recipe; one that is finished is only compared again.
        overwrite: throw away what the folder holds.
    Raises:
        InputError: the recipe cannot run, or its folder holds something that neither option covers.
        RunError: training could not go on.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    folder = StudyFolder(Path(recipe.output_dir) / recipe.name)
    checked = preflight(recipe)
    if problems := [*checked.problems, *tracker_problems(trackers)]:
        raise InputError(problems)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("several processes are not supported yet: start one, without torchrun or accelerate launch")
    _claim(folder, recipe, resume=resume, overwrite=overwrite)
    study = _Study(recipe, checked, folder, display, trackers)
    try:
        with FileLock(folder.path / ".lock", timeout=0):
            study.score_start_model()
            for segments in plan_segments(checked.arms, checked.plans, folder.path):
                study.train_arm(segments)
            return study.compare()
    except Timeout:
        raise InputError(Problem(f"another process is running the study in {folder.path}", "name")) from None


class _Study:
    def __init__(
        self, recipe: Recipe, checked: Preflight, folder: StudyFolder, display: Display, trackers: Sequence[str]
    ) -> None:
        self.recipe, self.checked, self.folder, self.display, self.trackers = recipe, checked, folder, display, trackers

    def score_start_model(self) -> None:
        """Score the model before training, so that what all arms lost shows."""
        arm = self.checked.arms[self.recipe.arm_names[0]]
        record = self.folder.start
        if record.result.is_file():
            return
        tokenizer = load_tokenizer(arm.model)
        valid = open_data(arm.data, tokenizer, arm.train.seed).valid
        model = _on_device(load_model(arm.model, DTYPES[arm.model.compute_dtype]))
        value = self._score(model, tokenizer, valid, record.eval, "start model")
        write_json(record.result, {"arm": "start", "perplexity": {"on": value}})

    def train_arm(self, segments: ArmSegments) -> None:
        """Train an arm, its trunk first, export and score it; what is there already is left as it is."""
        arm, folder = segments.own.arm, ArmFolder(segments.own.folder)
        if folder.result.is_file():
            self.display.note(f"{arm.name}: done already")
            return
        if segments.trunk is not None and not (segments.trunk.folder / "result.json").is_file():
            outcome = self._train(segments.trunk)[1]
            gc.collect()  # the trunk's model: it would count towards the first arm's peak memory
            write_json(segments.trunk.folder / "result.json", vars(outcome))
        model, outcome = self._train(segments.own)
        tokenizer = load_tokenizer(arm.model)
        sizes = self._export(model, tokenizer, segments.own, folder)
        del model
        gc.collect()
        valid = open_data(arm.data, tokenizer, arm.train.seed).valid
        write_json(folder.result, self._record(segments.own, outcome, sizes, self._score_arm(arm, folder, valid)))

    def compare(self) -> StudyResult:
        """Compare every quantized arm with its twin, and keep what comes out."""
        pairs = tuple(
            compare_arms(self.folder.arm(arm.twin), self.folder.arm(name), self.folder.start, self.recipe.budget)
            for name, arm in self.checked.arms.items()
            if arm.twin is not None
        )
        result = StudyResult(self.folder.path, pairs)
        write_comparison(self.folder, result)
        matches = {name: read_json(self.folder.arm(name).result)["match"] for name in self.checked.arms}
        arms = {name: {key: match[key] for key in ("seed", "data_hash")} for name, match in matches.items()}
        write_json(self.folder.environment, read_json(self.folder.environment) | {"arms": arms})
        return result

    def _train(self, segment: Segment) -> tuple[Any, Outcome]:
        arm = segment.arm
        tokenizer = load_tokenizer(arm.model)
        model = load_model(arm.model, DTYPES[arm.model.param_dtype])
        data = open_data(arm.data, tokenizer, arm.train.seed)
        first_step = segment.arm.warmup.steps if segment.trunk is not None else 0
        self.display.begin_training(segment.name, first_step, segment.last_step)
        outcome = train(segment, model, data.train, self.display, self.trackers)
        return model, outcome

    def _export(self, model: Any, tokenizer: Any, segment: Segment, folder: ArmFolder) -> dict[str, int]:
        """Write the plain folder and, for a quantized arm, the quantized one; returns the sizes of their weights."""
        dtype = DTYPES[segment.arm.model.compute_dtype]
        save_model(model, tokenizer, folder.path, dtype)
        sizes = {"plain_bytes": artifact.size_bytes(folder.path)}
        if segment.plan is not None:
            freeze(model, dtype)
            artifact.save(model, tokenizer, segment.plan, folder.quantized)
            sizes["quantized_bytes"] = artifact.size_bytes(folder.quantized)
        shown = ", ".join(f"{name.removesuffix('_bytes')} {readable_size(size)}" for name, size in sizes.items())
        self.display.note(f"{segment.name}: saved to {folder.path} ({shown})")
        return sizes

    def _score_arm(self, arm: Arm, folder: ArmFolder, valid: Batch) -> dict[str, float]:
        """Score what was saved, read back. Returns perplexities with quantizers on (or of a BF16 arm) and off."""
        plain = arm.model.model_copy(update={"path": str(folder.path), "revision": None})
        values: dict[str, float] = {}
        if arm.qat is not None:
            model, tokenizer = artifact.load(folder.path)
            values["on"] = self._score(_on_device(model), tokenizer, valid, folder.eval, f"{arm.name}, quantizers on")
        model, tokenizer = load_model(plain, DTYPES[arm.model.compute_dtype]), load_tokenizer(plain)
        if arm.qat is None:
            values["on"] = self._score(_on_device(model), tokenizer, valid, folder.eval, arm.name)
        else:
            what = f"{arm.name}, quantizers off"
            values["off"] = self._score(_on_device(model), tokenizer, valid, folder.eval_off, what)
        return values

    def _score(self, model: Any, tokenizer: Any, valid: Batch, output: Path, what: str) -> float:
        self.display.begin_scoring(what)
        score(model, tokenizer, self.recipe.eval, output_dir=output, on_progress=self.display.on_scored)
        batch_size = self.recipe.eval.batch_size
        return perplexity(model, valid.input_ids, batch_size=batch_size, labels=valid.labels).perplexity

    def _record(
        self, segment: Segment, outcome: Outcome, sizes: Mapping[str, int], perplexities: Mapping[str, float]
    ) -> dict[str, Any]:
        arm = segment.arm
        covered = self.checked.coverages.get(arm.name)
        return {
            "arm": arm.name,
            "twin": arm.twin,
            "match": {**matched_settings(arm), "data_hash": outcome.data_hash},
            "cost": {"seconds": outcome.seconds, "peak_memory_bytes": outcome.peak_memory_bytes},
            "coverage": str(covered) if covered is not None else None,
            "perplexity": dict(perplexities),
            "sizes": dict(sizes),
        }


def write_comparison(folder: StudyFolder, result: StudyResult) -> None:
    """comparison.json, comparison.csv with one row for each arm and task, and comparison.txt for the eye."""
    pairs = [pair.to_dict() for pair in result.pairs]
    write_json(folder.comparison, {"study": folder.name, "verdict": result.verdict, "pairs": pairs})
    replace_file(folder.comparison.with_suffix(".csv"), comparison_csv(result.pairs).encode())
    replace_file(folder.comparison.with_suffix(".txt"), comparison_text(pairs).encode())


def comparison_csv(pairs: Sequence[Pair]) -> str:
    """The comparisons of several arms in one table, with the arm and its twin in front of each row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for index, pair in enumerate(pairs):
        header, *rows = csv.reader(io.StringIO(pair.comparison.to_csv()))
        if index == 0:
            writer.writerow(["arm_name", "twin_name", *header])
        writer.writerows([pair.arm, pair.twin, *row] for row in rows)
    return text.getvalue()


def _claim(folder: StudyFolder, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Make the folder this recipe's, without losing anything that a user has not given up."""
    if folder.path.exists() and any(folder.path.iterdir()):
        if not folder.environment.is_file():
            raise InputError(Problem(f"{folder.path} holds something that is no study; give another name", "name"))
        if overwrite:
            shutil.rmtree(folder.path)
        elif resume:
            _check_same_recipe(folder, recipe)
        else:
            finished = folder.comparison.is_file()
            state, more = ("finished", "") if finished else ("unfinished", "--resume to go on with it, ")
            message = (
                f"{folder.path} holds a study that is {state} ({more}--overwrite to throw it away, or another name)"
            )
            raise InputError(Problem(message, "name"))
    if not folder.recipe.is_file():
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.environment, describe_environment())
        replace_file(folder.recipe, recipe.to_yaml().encode())


def _check_same_recipe(folder: StudyFolder, recipe: Recipe) -> None:
    if not folder.recipe.is_file():
        return
    saved, now = (_flat(made.model_dump(mode="json")) for made in (load_recipe(folder.recipe), recipe))
    changed = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    if changed:
        what = ", ".join(f"{key} ({saved.get(key)!r} -> {now.get(key)!r})" for key in changed[:5])
        message = f"{folder.path} was made with other settings: {what}; --overwrite it or give another name"
        raise InputError(Problem(message, "name"))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        key: value for part, child in tree.items() for key, value in _flat(child, f"{prefix}.{part}".strip(".")).items()
    }


def _on_device(model: Any) -> Any:
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
