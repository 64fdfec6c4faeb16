"""What the loss of the first step says of the text: a start model that is trained on what it was made for knows something
of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qatrun.data import IGNORE_INDEX, Batch

# Of ln(vocabulary), the loss of a uniform guess: near it the model guesses, above it is sure of what is not there.
NEAR, ABOVE = 0.9, 1.1
# The same in nats, of a text whose words follow each other as words do: it may just be far from all that the model knows.
NEAR_NATS, ABOVE_NATS = 0.3, 1.0
OF_START, BEYOND_START = 1.5, 1.0  # times, and nats: how far above held-out text of one source a batch may be
LEAST_TARGETS = 500  # in which the frequencies of tokens are known


def mistake_in_input(
    loss: float,
    batch: Batch,
    vocab_size: int,
    held_out_nll: float | None = None,
    *,
    ordered: bool = False,
    fits: bool = False,
) -> str | None:
    """What is wrong with the input by the loss of the first step; None where nothing shows.

    Args:
        batch: what the loss is of.
        held_out_nll: the start model's on held-out text of the same source, nats a token; None where there is none.
        ordered: whether the words of the text are known not to follow each other at random.
        fits: whether the tokenizer is known to be the model's: text with order is then foreign to the model at worst.
    """
    uniform, of_frequencies = math.log(vocab_size), _unigram_entropy(batch)
    if held_out_nll is not None and loss > max(OF_START * held_out_nll, held_out_nll + BEYOND_START):
        return (
            f"the first loss is {loss:.2f}, where the start model's is {held_out_nll:.2f} on held-out text of the same "
            "source: labels are shifted or masked wrongly, or that text is of another kind"
        )
    if ordered and fits:
        return None
    above, near = loss > ABOVE * uniform, loss > NEAR * uniform
    if ordered:
        above, near = loss > uniform + ABOVE_NATS, abs(loss - uniform) < NEAR_NATS
    if above:
        return (
            f"the first loss is {loss:.2f}, far above ln(vocabulary) = {uniform:.2f}, that of a mere guess: wrong data or "
            "another model's tokenizer. Check that the text is one, and that model and tokenizer belong together"
        )
    if near:
        return (
            f"the first loss is {loss:.2f}, near ln(vocabulary) = {uniform:.2f}: a pretrained model that only guesses. "
            "Check that model and tokenizer belong together and that its weights are pretrained"
        )
    if not ordered and of_frequencies is not None and loss > of_frequencies:
        return (
            f"the first loss is {loss:.2f}, more than the {of_frequencies:.2f} of token frequencies alone: the model knows "
            "nothing of this text. Check that it is one (random?), and of a language or notation that the model has seen"
        )
    return None


def _unigram_entropy(batch: Batch) -> float | None:
    """Nats, of the frequencies of a batch's tokens, corrected for its size (Miller and Madow 1955); None where it is small,
    or only some tokens are counted: answers may be of few words."""
    targets: Tensor = batch.labels[:, 1:].flatten()
    if len(targets) < LEAST_TARGETS or bool((targets == IGNORE_INDEX).any()):
        return None
    counts = torch.bincount(targets)
    counts = counts[counts > 0].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum() + (len(counts) - 1) / (2 * counts.sum()))
