"""An arm beside its twin: whether they may be compared, and everything the comparison says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from qatrun.errors import InputError, MismatchError, Problem
from qatrun.evaluate.comparison import Scored, compare, setting_mismatches
from qatrun.evaluate.scores import Scores
from qatrun.evaluate.text import load_texts
from qatrun.export import artifact
from qatrun.files import read_json
from qatrun.layout import EVAL, RESULT_FILE, START, TEXT_FILE, ArmFolder, StudyFolder, newest_study, no_such_study
from qatrun.recipe import DEFAULT_BUDGET_PP, load_recipe
from qatrun.recipe.schema import DEFAULT_BUDGET_PERPLEXITY, PERPLEXITY, TRAINING, Budgets
from qatrun.records.comparison import OverPtq, Pair, StudyComparison
from qatrun.records.diagnosis import ArmDiagnosis, StudyDiagnosis
from qatrun.records.scores import TextScores
from qatrun.records.training import ArmResult, Result
from qatrun.report.total import Total, totals
from qatrun.study.doneness import changed_since_scored
from qatrun.study.records import losses
from qatrun.study.results import alarms_raised
from qatrun.train.metrics import read_alarms


def compare_arms(
    twin: ArmFolder,
    arm: ArmFolder,
    start: ArmFolder | None,
    budgets: Mapping[str, float | None],
    *,
    anyway: bool = False,
) -> Pair:
    """Compare two scored folders.

    Args:
        twin: what the arm is compared with: its BF16 twin, or the start model.
        start: the model before training, where its scores are known.
        budgets: as `evaluate.comparison.compare` has them.
        anyway: compare although they differ in more than quantization; the differences are kept in the result.
    Raises:
        InputError: no scores there.
        MismatchError: they differ in data, steps, learning rate, seed, model or evaluation, answered other items, or are
            not what was scored any more.
    """
    twin_scores, arm_scores = Scores.load(twin.eval), Scores.load(arm.eval)
    of_twin, of_arm = _record(twin), _record(arm)
    of_start = read_json(start.result, Result) if start is not None and start.result.is_file() else None
    from_start = of_arm is not None and of_arm.twin == START and start is not None and twin.path == start.path
    # Scores that a record speaks of are not left out because they are gone.
    off_scores = Scores.load(arm.eval_off) if arm.eval_off.is_dir() or _perplexity(of_arm, "off") else None
    start_scores = Scores.load(start.eval) if start is not None and (start.eval.is_dir() or of_start) else None
    problems = setting_mismatches(twin_scores, arm_scores)
    problems += [] if from_start else _training_mismatches(of_twin, of_arm)
    problems += [Problem(f"{text}: its scores are of other weights") for text in _changed(twin, arm)]
    if problems and not anyway:
        raise MismatchError([Problem(f"{twin.path.name} and {arm.path.name} do not match:"), *problems])
    unknown = [task for task in twin_scores.tasks if not budgets.get(task)]
    if unknown:
        raise InputError(Problem(f"no budget for {', '.join(unknown)}", "budget"))
    perplexity = {
        "start": _perplexity(of_start, "on"),
        "twin": _perplexity(of_start if from_start else of_twin, "on"),
        "arm": _perplexity(of_arm, "on"),
        "arm_off": _perplexity(of_arm, "off"),
    }
    return Pair(
        arm=arm.path.name,
        twin=twin.path.name,
        method="qat" if of_arm is None else of_arm.method,
        comparison=compare(
            None if start_scores is None else Scored(start_scores, _texts(start)),
            Scored(twin_scores, _texts(twin)),
            Scored(arm_scores, _texts(arm)),
            off_scores,
            budgets,
        ),
        loss_ape_percent=_loss_ape(twin, arm, of_arm),
        perplexity={key: value for key, value in perplexity.items() if value is not None},
        cost={key: record.cost for key, record in (("twin", of_twin), ("arm", of_arm)) if record is not None},
        sizes=of_arm.sizes if of_arm else {},
        coverage=of_arm.coverage if of_arm else None,
        mismatches=[str(problem) for problem in problems],
        format=_format(arm),
    )


def _format(arm: ArmFolder) -> str:
    if not arm.plan.is_file():
        return ""
    schemes = artifact.read_plan(arm.quantized).slots()
    return "+".join(dict.fromkeys(scheme.format for slot, scheme in schemes.items() if slot.role != "grad_output"))


def _changed(*folders: ArmFolder) -> list[str]:
    return [text for folder in folders for text in changed_since_scored(folder)]


def _texts(folder: ArmFolder | None) -> TextScores | None:
    """What it read; None where only its answers are known, of an earlier version or scored by `qatrun eval` without text."""
    return load_texts(folder.eval) if folder is not None and (folder.eval / TEXT_FILE).is_file() else None


def _record(folder: ArmFolder) -> ArmResult | None:
    """What training wrote about an arm; None for a folder that only holds scores, and for the start model."""
    if not folder.result.is_file() or "match" not in read_json(folder.result, Result).to_dict():
        return None
    return read_json(folder.result, ArmResult)


def _perplexity(record: Result | ArmResult | None, quantizers: str) -> float | None:
    return record.perplexity.get(quantizers) if record is not None else None


def _training_mismatches(twin: ArmResult | None, arm: ArmResult | None) -> list[Problem]:
    if twin is None or arm is None:
        return [Problem("no training record of both (result.json), so nothing shows that they match")]
    of_twin, of_arm = dict(twin.match), dict(arm.match)
    return [
        Problem(f"the twin has {of_twin.get(key)!r}, the arm {of_arm.get(key)!r}", key)
        for key in of_twin | of_arm
        if of_twin.get(key) != of_arm.get(key)
    ]


def _loss_ape(twin: ArmFolder, arm: ArmFolder, record: ArmResult | None) -> dict[str, float]:
    num_steps = 0 if record is None else record.match["steps"]
    of_twin, of_arm = losses(twin, num_steps), losses(arm, num_steps)
    errors = [
        (row["phase"], 100 * abs(row["loss"] - of_twin[step]["loss"]) / of_twin[step]["loss"])
        for step, row in of_arm.items()
        if of_twin
    ]
    after = [error for phase, error in errors if phase == "qat"]
    means = {"all_steps": [error for _, error in errors], "after_switch": after}
    return {name: sum(values) / len(values) for name, values in means.items() if values}


def compare_named(
    twin: str, arm: str, *, study: str | None, output_dir: Path, budgets: Sequence[str] = (), anyway: bool = False
) -> tuple[str, Pair]:
    """Compare two arms of a study (the newest unless named), or two folders with scores.

    Args:
        budgets: `task=pp` each, over those of the study; tasks of folders outside a study have DEFAULT_BUDGET_PP.
    Returns:
        (what was taken, the comparison).
    """
    if twin == arm:
        raise InputError(f"{twin} beside itself says nothing: name two arms, or two folders")
    if Path(twin).is_dir() and Path(arm).is_dir() and study is None:
        of_twin, of_arm = ArmFolder(Path(twin)), ArmFolder(Path(arm))
        start = _start_beside(of_twin, of_arm)
        return f"{twin} and {arm}", compare_arms(of_twin, of_arm, start, _budgets(of_twin, budgets), anyway=anyway)
    found = _study_named(study, output_dir)
    of_twin, of_arm = found.arm(twin), found.arm(arm)
    scored = sorted(file.parent.name for file in found.path.glob(f"*/{RESULT_FILE}") if (file.parent / EVAL).is_dir())
    missing = [folder.path.name for folder in (of_twin, of_arm) if not folder.eval.is_dir()]
    if missing:
        raise InputError(f"{found.path} has no scores of {', '.join(missing)} (it has {', '.join(scored) or 'none'})")
    pair = compare_arms(of_twin, of_arm, found.start, _budgets(of_twin, budgets), anyway=anyway)
    return f"{twin} and {arm} of {found.path}", pair


def _study_named(study: str | None, output_dir: Path) -> StudyFolder:
    """
    Raises:
        InputError: no such study, or one with a study for each of its seeds.
    """
    found = StudyFolder(output_dir / study) if study else newest_study(output_dir)
    if found is None or not found.recipe.is_file():
        raise no_such_study(study, output_dir)
    if found.replicas:
        choices = " or ".join(f"--study {replica.path.relative_to(output_dir)}" for replica in found.replicas)
        raise InputError(f"{found.path} holds a study for each of its seeds: compare in one of them, {choices}")
    return found


def ranked_arms(
    twin: str | None,
    arm: str | None,
    *,
    study: str | None,
    output_dir: Path,
    budgets: Sequence[str] = (),
    anyway: bool = False,
) -> tuple[str, tuple[Total, ...], list[OverPtq]]:
    """The comparison of two arms or folders, or of every quantized arm of a study with its twin, the best first.

    Returns:
        (what was taken, from start to what ships, trained arms against calibrated ones where a study has both).
    Raises:
        InputError: as `compare_named`, or the study has no arm beside a twin.
    """
    if twin is not None and arm is not None:
        took, pair = compare_named(twin, arm, study=study, output_dir=output_dir, budgets=budgets, anyway=anyway)
        folders = {pair.twin: ArmFolder(Path(twin)), pair.arm: ArmFolder(Path(arm))}
        diagnosed: dict[str, ArmDiagnosis] = {}
        if study is not None or not all(folder.path.is_dir() for folder in folders.values()):
            found = _study_named(study, output_dir)
            folders = {name: found.arm(name) for name in folders}
            if read_json(folders[pair.arm].result, Result).twin == pair.twin:
                diagnosed = _diagnosed(found)
        alarms = {name: read_alarms(folder.alarms) for name, folder in folders.items()}
        return took, totals([pair], diagnosed, alarms), []
    found = _study_named(study, output_dir)
    twins = {name: read_json(found.arm(name).result, Result).twin for name in found.begun if _scored(found.arm(name))}
    pairs = [
        compare_arms(found.arm(of), found.arm(name), found.start, _budgets(found.arm(of), budgets), anyway=anyway)
        for name, of in twins.items()
        if of is not None
    ]
    if not pairs:
        raise InputError(
            f"{found.path} has no quantized arm with scores beside a BF16 twin's (unfinished? see `qatrun studies`)"
        )
    against = read_json(found.comparison, StudyComparison).over_ptq if found.comparison.is_file() else []
    return f"every arm of {found.path}", totals(pairs, _diagnosed(found), alarms_raised(found)), against


def _diagnosed(study: StudyFolder) -> dict[str, ArmDiagnosis]:
    return read_json(study.diagnosis, StudyDiagnosis).arms if study.diagnosis.is_file() else {}


def _scored(folder: ArmFolder) -> bool:
    return folder.result.is_file() and folder.eval.is_dir()


def _start_beside(*folders: ArmFolder) -> ArmFolder | None:
    """The start model of the study that both folders are arms of."""
    parents = {folder.path.resolve().parent for folder in folders}
    start = StudyFolder(parents.pop()).start
    return start if not parents and start.eval.is_dir() else None


def _budgets(folder: ArmFolder, given: Sequence[str]) -> Budgets:
    recipe = StudyFolder(folder.path.resolve().parent).recipe
    if recipe.is_file():
        budgets = dict(load_recipe(recipe).budget)
    else:
        tasks = Scores.load(folder.eval).tasks
        budgets = {**dict.fromkeys(tasks, DEFAULT_BUDGET_PP), PERPLEXITY: DEFAULT_BUDGET_PERPLEXITY}
    for text in given:
        task, _, value = text.rpartition("=")
        if task not in (*budgets, TRAINING):
            raise InputError(f"--budget {text}: no such task (scored: {', '.join(budgets)})")
        budgets[task] = _positive(value, text)
    return budgets


def _positive(value: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InputError(f"--budget {text}: must be TASK=PP, PP a positive number of percentage points")
    return number
