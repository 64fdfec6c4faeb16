"""The texts that every model of a study reads, so that what is lost from one to another can be told token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qatrun.data import Batch, open_data
from qatrun.data.randomness import LEAST_CHARACTERS, drawn_at_random
from qatrun.evaluate.attribution import HELD_OUT, KNOWN
from qatrun.layout import StudyFolder
from qatrun.recipe import Arm, Recipe
from qatrun.study.inputs import check_inputs
from qatrun.study.known_text import KnownText

LOOKED_AT = 8192  # tokens


def has_order(input_ids: Tensor, tokenizer: Any) -> bool:
    """Whether characters and words of a text are known not to follow each other as if drawn at random: then it is one,
    however foreign to a model.

    Args:
        input_ids: [num, seq_len] token ids.
    """
    text = tokenizer.decode(input_ids.flatten().tolist(), skip_special_tokens=True)
    return len(text) >= LEAST_CHARACTERS and drawn_at_random([text]) is None


def study_texts(
    folder: StudyFolder, recipe: Recipe, arm: Arm, tokenizer: Any, known: KnownText | None
) -> dict[str, Batch]:
    """Held-out text, and text that the start model knew where there is such; it may be the same.

    Raises:
        InputError: the data changed since the study began.
    """
    check_inputs(folder, recipe)
    held_out = open_data(arm.data, tokenizer, arm.train.seed).valid
    if known is None:
        return {HELD_OUT: held_out}
    of_a_kind = known.source == "held-out"
    return {HELD_OUT: held_out, KNOWN: held_out if of_a_kind else Batch(known.input_ids, known.input_ids)}
