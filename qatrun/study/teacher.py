"""A teacher, held against the model that learns from it: before training, from configuration, headers and vocabularies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from qatrun.errors import InputError, Problem
from qatrun.model import architecture, check_model, text_config
from qatrun.recipe import Arm, ModelConfig
from qatrun.recipe.distill import START_MODEL
from qatrun.study.inputs import TEACHER_KEY
from qatrun.tokenizer import load_tokenizer

TeacherKey = tuple[ModelConfig, ModelConfig, int]


def teacher_key(arm: Arm) -> TeacherKey | None:
    """What `check_teacher` goes by: model, teacher and length of the text; None without a teacher."""
    return None if arm.teacher is None else (arm.model, arm.teacher, arm.data.seq_len)


def teacher_text(arm: Arm) -> str | None:
    """What an arm learns from beside the text, in words; None where nothing."""
    if (distill := arm.train.distill) is None:
        return None
    who = "the start model" if distill.teacher == START_MODEL else distill.teacher
    warm = "" if distill.temperature == 1 else f", temperature {distill.temperature:g}"
    return f"loss: {1 - distill.weight:g} cross-entropy + {distill.weight:g} KL from {who}{warm}"


def check_teacher(arm: Arm, model: nn.Module, tokenizer: Any) -> int:
    """Make sure that an arm's teacher says what the arm can learn: probabilities of the same tokens.

    Args:
        model: the arm's, on the meta device.
        tokenizer: the arm's.
    Returns:
        the number of the teacher's parameters.
    Raises:
        InputError: it cannot be loaded, has other tokens, or a shorter context.
    """
    teacher = arm.teacher
    assert teacher is not None
    if teacher == arm.model:
        return sum(parameter.numel() for parameter in model.parameters())
    try:
        empty = architecture(teacher)
        check_model(teacher, empty)
        own = load_tokenizer(teacher)
    except InputError as error:
        raise InputError([Problem(problem.message, TEACHER_KEY, problem.where) for problem in error.problems]) from None
    if mistakes := list(_mistakes(empty, own, arm.data.seq_len, model, tokenizer)):
        raise InputError([Problem(f"{teacher.path}: {mistake}", TEACHER_KEY) for mistake in mistakes])
    return sum(parameter.numel() for parameter in empty.parameters())


def _mistakes(empty: nn.Module, own: Any, seq_len: int, model: nn.Module, tokenizer: Any) -> Iterator[str]:
    of_teacher, of_model = text_config(empty), text_config(model)
    if of_teacher.vocab_size != of_model.vocab_size:
        yield (
            f"the teacher has logits for {of_teacher.vocab_size:,} tokens, the model for {of_model.vocab_size:,}: it must "
            "be a model with the same vocabulary"
        )
    elif differing := _differing(own.get_vocab(), tokenizer.get_vocab()):
        token, there, here = differing
        yield (
            f"the teacher's tokenizer is another one: '{token}' is {_id(there)} there and {_id(here)} in the model's, so "
            "that its probabilities would be of other tokens"
        )
    context = getattr(of_teacher, "max_position_embeddings", None)
    if context is not None and 0 < context < seq_len:
        yield f"{seq_len} tokens (data.seq_len) do not fit the teacher's context of {context}"


def _differing(there: dict[str, int], here: dict[str, int]) -> tuple[str, int | None, int | None] | None:
    """A token whose ids differ, with both; None where there is none."""
    differing = (token for token in sorted(here | there) if there.get(token) != here.get(token))
    token = next(differing, None)
    return None if token is None else (token, there.get(token), here.get(token))


def _id(number: int | None) -> str:
    return "no token" if number is None else f"token {number}"
