"""Whether training under quantization beats calibration alone here, and by how much: trained arms against calibrated ones
that were made from the same twin, or from the start model where the trained one has no twin, in the same formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qatrun.evaluate.attribution import HELD_OUT
from qatrun.evaluate.replication import correct_of_seeds, difference, text_rise
from qatrun.evaluate.scores import Scores
from qatrun.evaluate.text import load_texts, perplexity
from qatrun.layout import START, StudyFolder
from qatrun.recipe import Arm, Recipe
from qatrun.records.comparison import OverPtq
from qatrun.text import listed

LOOKS = 2  # accuracy and perplexity
CONFIDENCE = 1.0 - 0.05 / LOOKS


def over_ptq(recipe: Recipe, studies: Sequence[StudyFolder]) -> list[OverPtq]:
    """Of every two such arms; none where there are none.

    Args:
        studies: finished, one for each seed.
    """
    return [_compared(recipe, studies, *pair) for pair in _pairs(recipe)]


def _pairs(recipe: Recipe) -> Iterator[tuple[Arm, Arm]]:
    arms = [arm for arm in recipe.arm_by_name.values() if arm.qat is not None]
    for ptq in arms:
        for qat in arms:
            if not ptq.trains and qat.trains and (qat.twin or START, _formats(qat)) == (ptq.twin, _formats(ptq)):
                yield qat, ptq


def _formats(arm: Arm) -> str:
    assert arm.qat is not None
    found = dict.fromkeys(of[role].format for of in arm.qat.all_schemes for role in ("weight", "input"))
    return ", ".join(found)


def _compared(recipe: Recipe, studies: Sequence[StudyFolder], qat: Arm, ptq: Arm) -> OverPtq:
    tasks = list(recipe.eval.tasks)
    folders = [[study.arm(arm.name).eval for study in studies] for arm in (qat, ptq)]
    ours, theirs = ([Scores.load(folder) for folder in of_arm] for of_arm in folders)
    correct = correct_of_seeds(ours, tasks)
    found = difference(correct, correct_of_seeds(theirs, tasks), CONFIDENCE)
    rise = text_rise(*([load_texts(folder).texts[HELD_OUT] for folder in of_arm] for of_arm in reversed(folders)))
    edges = None if rise is None else [_percent(nats) for nats in rise.interval(CONFIDENCE)]
    accuracy = [100 * edge for edge in found.interval]
    return OverPtq(
        formats=_formats(qat),
        qat=qat.name,
        ptq=ptq.name,
        num_items=correct.shape[1],
        accuracy_pp=100 * found.mean,
        ci_accuracy_pp=accuracy,
        perplexity_percent=None if rise is None else _percent(rise.of_text.mean),
        ci_perplexity_percent=edges,
        answer=_answer(accuracy, edges),
        has_twin=qat.twin is not None,
    )


def _answer(accuracy: Sequence[float], text: Sequence[float] | None) -> str:
    gained = {"accuracy": accuracy, "perplexity": [-edge for edge in reversed(text or ())]}
    better = [name for name, edges in gained.items() if edges and edges[0] > 0]
    worse = [name for name, edges in gained.items() if edges and edges[1] < 0]
    if better and worse:
        return f"QAT is better by {better[0]}, PTQ by {worse[0]}"
    if not (better or worse):
        return "no difference shown"
    return f"{'QAT beats PTQ' if better else 'PTQ beats QAT'} by {listed(better or worse)}"


def _percent(nats: float) -> float:
    return 100 * (perplexity(nats) - 1)
