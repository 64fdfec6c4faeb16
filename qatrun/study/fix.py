"""`qatrun fix`: the remedy that a diagnosis names is tried as another arm of the study, and what it gave back is measured.

The new arm branches from the same trunk (another learning rate takes a trunk and a BF16 twin of its own), is trained,
scored, compared and diagnosed like any arm. It cured the arm when every cause that was found there is ruled out for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

from qatrun.errors import InputError, Problem
from qatrun.evaluate.attribution import rise
from qatrun.evaluate.text import load_texts
from qatrun.export import artifact
from qatrun.files import read_json, write_json
from qatrun.layout import StudyFolder
from qatrun.recipe import Arm, Recipe, load_recipe, parse_recipe
from qatrun.recipe.document import deep_merge
from qatrun.records.diagnosis import ArmDiagnosis, Cause, StudyDiagnosis
from qatrun.records.fix import FixedArm, Fixes, Gain
from qatrun.study.display import Display
from qatrun.study.named import named_study
from qatrun.study.records import tensor_records
from qatrun.study.remedies import Remedy, remedies
from qatrun.study.runner import run_study

FIX = "-fix"


def fix_study(study: str | None, output_dir: Path, display: Display, *, tries: int = 2) -> Fixes:
    """Try remedies for every arm of a diagnosed study in which a cause was found; also written to fix.json.

    Args:
        tries: remedies for each arm at most, the likeliest first, until one cures it.
    Raises:
        InputError: no such study, or one that is not diagnosed.
    """
    folder = named_study(study, output_dir)
    recipe = load_recipe(folder.recipe)
    broken = _broken(folder, recipe)
    fixes = [_fix_arm(folder, arm, display, tries) for arm in broken]
    result = Fixes(arms=[one for of_arm in fixes for one in of_arm], healthy=not broken)
    write_json(folder.fix, result)
    return result


def _studies(folder: StudyFolder) -> Sequence[StudyFolder]:
    """Of each seed; the study itself where it has one."""
    return folder.replicas or (folder,)


def _diagnosed(folder: StudyFolder) -> dict[str, list[ArmDiagnosis]]:
    """Arm -> its diagnosis in each seed."""
    found = [read_json(one.diagnosis, StudyDiagnosis).arms for one in _studies(folder) if one.diagnosis.is_file()]
    if not found:
        raise InputError(Problem(f"{folder.path} is not diagnosed: `qatrun diagnose` does it", "study"))
    return {name: [arms[name] for arms in found if name in arms] for name in found[0]}


def _broken(folder: StudyFolder, recipe: Recipe) -> list[str]:
    """Arms in which a cause was found, those aside that a fix made."""
    made = {one.arm for one in read_json(folder.fix, Fixes).arms} if folder.fix.is_file() else set()
    found = _diagnosed(folder)
    return [name for name in recipe.arm_names if name not in made and any(one.findings for one in found.get(name, ()))]


def _fix_arm(folder: StudyFolder, name: str, display: Display, tries: int) -> list[FixedArm]:
    arm = load_recipe(folder.recipe).arm_by_name[name]
    before = _diagnosed(folder)[name]
    causes = list(dict.fromkeys(cause for one in before for cause in one.findings))
    done: list[FixedArm] = []
    for number, remedy in enumerate(_candidates(folder, arm, causes)[:tries], 1):
        fixed = f"{name}{FIX}{number}"
        display.note(f"{name}: trying {remedy.text}")
        recipe = load_recipe(folder.recipe)
        run_study(_with_arm(recipe, arm, fixed, remedy), display, resume=True)
        done.append(_judged(folder, fixed, arm, causes, remedy, before))
        if done[-1].cured:
            break
    return done or [FixedArm(of=name, causes=causes)]


def _candidates(folder: StudyFolder, arm: Arm, causes: Sequence[str]) -> list[Remedy]:
    """The n-th of them holds the n-th remedy for each cause, or the last that there is."""
    mine = _studies(folder)[0].arm(arm.name)
    plan, tensors = artifact.read_plan(mine.quantized), tensor_records(mine.path, arm.monitor.alarms)
    lists = [found for cause in causes if (found := remedies(cause, arm, plan, tensors))]
    longest = max(map(len, lists), default=0)
    return [reduce(add, (found[min(n, len(found) - 1)] for found in lists)) for n in range(longest)]


def _with_arm(recipe: Recipe, arm: Arm, name: str, remedy: Remedy) -> Recipe:
    """The recipe with an arm that has the remedy, and a BF16 twin for it where training itself is changed."""
    twins = {each: its for each in recipe.arms if (its := recipe.arm_by_name[each].twin) is not None}
    arms = {each: given | ({"twin": twins[each]} if each in twins else {}) for each, given in recipe.arms.items()}
    twin = str(arm.twin)
    if remedy.of_training:
        of_twin = f"{twin}-for-{name}"
        training = {key: value for key, value in remedy.overrides.items() if key != "qat"}
        arms[of_twin] = deep_merge(recipe.arms[twin], training)
        twin = of_twin
    arms[name] = {**deep_merge(recipe.arms[arm.name], remedy.overrides), "twin": twin}
    return parse_recipe(recipe.model_dump(mode="json") | {"arms": arms})


def _judged(
    folder: StudyFolder, name: str, arm: Arm, causes: list[str], remedy: Remedy, before: list[ArmDiagnosis]
) -> FixedArm:
    after = _diagnosed(folder)[name]
    gains = []
    for study in _studies(folder):
        old, new = (load_texts(study.arm(each).eval).texts for each in (arm.name, name))
        for text in old.keys() & new.keys():
            gain = rise(new[text], old[text])
            gains.append(Gain(study=study.name, text=text, nats=gain.mean, ci95=list(gain.interval())))
    return FixedArm(
        arm=name,
        of=arm.name,
        causes=causes,
        remedy=remedy.text,
        cured=all(one.causes[cause].answer == "ruled out" for one in after for cause in causes),
        before=[_shown(one, causes) for one in before],
        after=[_shown(one, causes) for one in after],
        gains=sorted(gains, key=lambda gain: (gain.study, gain.text)),
        sentence=after[0].sentence,
    )


def _shown(diagnosis: ArmDiagnosis, causes: list[str]) -> dict[str, Cause]:
    return {cause: diagnosis.causes[cause] for cause in causes}
