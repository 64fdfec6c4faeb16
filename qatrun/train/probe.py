"""The forgetting probe: how far a model has moved from the start model on fixed held-out text.

    KL(start || now) = mean over tokens of  sum_v p(v) (log p(v) - log q(v))

p are the start model's next-token probabilities, taken once and kept on disk: the top k of each token, all others
counted as one outcome (which can only make the divergence smaller). So no second model stays in memory. With quantizers
off the probe shows what training forgot, or learned instead; with quantizers on, what quantization adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatrun.files import reading, whole_file
from qatrun.model import text_config

LOGITS_AT_ONCE = 2**26  # values, which bounds the memory that a probe takes


@dataclass(frozen=True)
class Probe:
    """What the start model says about the text.

    Attributes:
        input_ids: [num, seq_len] int64.
        likeliest: [num, seq_len, k] int32, its likeliest next tokens.
        log_probs: [num, seq_len, k] float32, of those.
    """

    input_ids: Tensor
    likeliest: Tensor
    log_probs: Tensor

    @classmethod
    @torch.no_grad()
    def of_start(
        cls, model: Any, input_ids: Tensor, top_k: int, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Probe:
        """Ask the start model, computing as training does; leaves it in the mode it was in."""
        kept = [
            logits.log_softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1)
            for logits in _logits(model, input_ids, autocast)
        ]
        likeliest = torch.cat([top.indices.int().cpu() for top in kept])
        return cls(input_ids, likeliest, torch.cat([top.values.cpu() for top in kept]))

    def save(self, file: Path) -> None:
        """Write it whole or not at all."""
        with whole_file(file) as partial:
            save_file({name: value.contiguous() for name, value in vars(self).items()}, partial)

    @classmethod
    def load(cls, file: Path) -> Probe:
        """
        Raises:
            DamagedFileError: it is missing, torn or something else.
        """
        with reading(file):
            return cls(**load_file(file))

    @torch.no_grad()
    def divergence(self, model: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> float:
        """KL from the start model, nats per token, of the model as it computes now; leaves its mode as it was."""
        total, done = 0.0, 0
        for logits in _logits(model, self.input_ids, autocast):
            rows = slice(done, done + len(logits))
            total += float(_kl(logits, self.likeliest[rows], self.log_probs[rows]).double().sum())
            done += len(logits)
        return total / self.input_ids.numel()


def _logits(model: Any, input_ids: Tensor, autocast: Callable[[], AbstractContextManager[Any]]) -> Iterator[Tensor]:
    """[batch, seq_len, vocab] float32 of as many sequences at once as memory permits."""
    device = next(model.parameters()).device
    at_once = max(1, LOGITS_AT_ONCE // (input_ids.shape[1] * text_config(model).vocab_size))
    was_training = model.training
    model.eval()
    try:
        for batch in input_ids.split(at_once):
            with autocast():
                logits = model(input_ids=batch.to(device), use_cache=False).logits
            yield logits.float()
    finally:
        model.train(was_training)


def _kl(logits: Tensor, likeliest: Tensor, log_probs: Tensor) -> Tensor:
    """[batch, seq_len] nats; one outcome for each of the k, and one for all others together."""
    p_log = log_probs.to(logits.device)
    q_log = logits.log_softmax(-1).gather(-1, likeliest.to(logits.device).long())
    named = (p_log.exp() * (p_log - q_log)).sum(-1)
    p_rest, q_rest = (1 - log.exp().sum(-1) for log in (p_log, q_log))
    tiny = torch.finfo(torch.float32).eps  # sums of float32 probabilities are no better than this
    p_rest, q_rest = p_rest.clamp(min=0.0), q_rest.clamp(min=tiny)
    return named + torch.where(p_rest > tiny, p_rest * (p_rest / q_rest).log(), 0.0)
