"""What the verbs that measure a recipe's start model, and train nothing, have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qatrun.errors import InputError
from qatrun.model import text_config
from qatrun.recipe import Arm, Recipe
from qatrun.records.sensitivity import Budget
from qatrun.study import keeping
from qatrun.study.checking import Preflight, preflight
from qatrun.study.display import ScoringDisplay

ASKED_ELSEWHERE = {"eval", "export"}  # sections of a recipe that matter to what is trained, scored and exported
LOGITS_AT_ONCE = 2**27


def preflight_to_measure(recipe: Recipe) -> Preflight:
    """Whose problems are none of what is measured here.

    Raises:
        InputError: the recipe's model, text or quantization are wrong.
    """
    checked = preflight(recipe)
    if problems := [each for each in checked.problems if not ASKED_ELSEWHERE & set(each.key.split("."))]:
        raise InputError(problems)
    return checked


def budget_of(recipe: Recipe, given: str | None) -> Budget:
    """What was given (see `keeping.parse_budget`), else the recipe's for perplexity."""
    return keeping.parse_budget(f"{recipe.budget['perplexity'] or 1.0}%" if given is None else given)


def sequences_at_once(arm: Arm, model: nn.Module) -> int:
    """As many as a micro-batch has, but no more than there is memory for their logits."""
    room: int = LOGITS_AT_ONCE // (arm.data.seq_len * text_config(model).vocab_size)
    return max(1, min(arm.train.micro_batch_size, room))


@contextmanager
def saying_what_is_saved(display: ScoringDisplay) -> Iterator[None]:
    """Where Ctrl-C stops it."""
    try:
        yield
    except KeyboardInterrupt:
        display.on_warning("stopped by Ctrl-C: what is measured is saved, and the same command goes on from there")
        raise
