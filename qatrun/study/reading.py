"""What `qatrun eval` reads for a perplexity: a text that is named, else the held-out text of the model's study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qatrun.data import Batch, open_data, open_probe
from qatrun.errors import InputError, Problem
from qatrun.export import artifact
from qatrun.layout import StudyFolder
from qatrun.recipe import DataConfig, Source, load_recipe
from qatrun.study.display import ScoringDisplay

SEQUENCES, SEQ_LEN = 64, 512  # of a text that is named
OPTION = "--text"


def text_to_read(
    path: Path, text: str | None, tokenizer: Any, context: int | None, display: ScoringDisplay
) -> Batch | None:
    """
    Args:
        path: of the model.
        text: file, folder or hub id of a text; None: that of the model's study.
        context: of the model, in tokens; None where it has no limit.
    Returns:
        None where no text is named and none belongs to the model; why, is said where there should be one.
    Raises:
        InputError: the text that is named cannot be read.
    """
    if text is not None:
        source = Source(path=text)
        data = DataConfig(train=source, probe=source, seq_len=min(SEQ_LEN, context or SEQ_LEN))
        try:
            ids = open_probe(data, tokenizer, SEQUENCES)
        except InputError as error:
            raise InputError([Problem(f"{OPTION} {problem.message}") for problem in error.problems]) from None
        return None if ids is None else Batch(ids, ids)
    arm = path.resolve()
    arm = arm.parent if artifact.find(path) == path else arm  # the quantized folder inside an arm's
    file = StudyFolder(arm.parent).recipe
    if not file.is_file():
        return None
    arms = load_recipe(file).arm_by_name
    its = arms.get(arm.name) or next(iter(arms.values()))
    try:
        return open_data(its.data, tokenizer, its.train.seed).valid
    except InputError as error:
        display.on_warning(f"no perplexity: {error}")
        return None
