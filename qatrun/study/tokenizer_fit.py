"""Does the tokenizer belong to the model? Asked where a text costs the model more than a mere guess: is the text foreign to
it, or are the tokens?

What a model writes, decoded and encoded anew, is the same text, and reads as well, if the tokenizer is its own. Another
model's decodes it to syllables in no order, and encodes these as other tokens. This tells nothing where any tokens come back
as they were, as where each is a word: there it is not known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatrun.evaluate.text import mean_nll
from qatrun.model import text_config

KEPT = 0.75  # of each sequence: what is encoded anew may take fewer tokens
# Nats a token that writing may cost more when it has come back. Measured on six models: with their own tokenizer 0.02 to
# 0.09, with another that begins with the same alphabet from 0.3, with one that shares nothing from 1.7.
AS_WRITTEN = 0.2


def fits(model: Any, tokenizer: Any, own: Tensor, *, batch_size: int) -> bool:
    """Whether the tokenizer is known to be the model's.

    Args:
        own: [num, seq_len] token ids that the model wrote, but for the first of each sequence.
    """
    if not _tells(tokenizer, own):
        return False
    back, length = come_back(tokenizer, own), int(KEPT * own.shape[1])
    if len(back) <= len(own) // 2 or int(back.max()) >= text_config(model).vocab_size:
        return False
    before, after = (mean_nll(model, text, batch_size=batch_size) for text in (own[:, :length], back))
    return after - before <= AS_WRITTEN


def come_back(tokenizer: Any, ids: Tensor) -> Tensor:
    """[as many or fewer, KEPT * seq_len]: the sequences decoded and encoded anew, but for the first token of each; those
    that come out shorter are left out."""
    length = int(KEPT * ids.shape[1])
    texts = tokenizer.batch_decode(ids[:, 1:].tolist())
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [[first, *row[: length - 1]] for first, row in zip(ids[:, 0].tolist(), encoded, strict=True)]
    kept = [row for row in rows if len(row) == length]
    return torch.tensor(kept).reshape(len(kept), length)


def _tells(tokenizer: Any, own: Tensor) -> bool:
    """Whether tokens that are dealt at random would not come back as they were."""
    dealt = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(0))
    other = dealt[own.clamp(max=len(tokenizer) - 1)]
    back = come_back(tokenizer, other)
    same = (back == other[: len(back), : back.shape[1]]).all(dim=1).sum() if len(back) == len(other) else 0
    return int(same) < len(other) // 2
