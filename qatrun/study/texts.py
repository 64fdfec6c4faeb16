"""The texts that every model of a study reads, so that what is lost from one to another can be told token by token."""

from __future__ import annotations

from typing import Any

from qatrun.data import Batch, open_data, open_probe
from qatrun.evaluate.attribution import HELD_OUT, KNOWN
from qatrun.layout import StudyFolder
from qatrun.recipe import Arm, Recipe
from qatrun.study.inputs import check_inputs


def study_texts(folder: StudyFolder, recipe: Recipe, arm: Arm, tokenizer: Any) -> dict[str, Batch]:
    """Held-out text, and text that the start model knew where there is such.

    Raises:
        InputError: the data changed since the study began.
    """
    check_inputs(folder, recipe)
    texts = {HELD_OUT: open_data(arm.data, tokenizer, arm.train.seed).valid}
    if arm.data.probe is not None:
        known = open_probe(arm.data, tokenizer, arm.data.valid_sequences)
        texts[KNOWN] = Batch(known, known)
    return texts
