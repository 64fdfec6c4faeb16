"""The forgetting probe: what a model has lost of what the start model knew, on fixed text of that.

    rise of the loss = mean over tokens of  log p(token) - log q(token)
    KL(start || now) = mean over tokens of  sum_v p(v) (log p(v) - log q(v))

p are the start model's next-token probabilities, q those of now. The rise is what is lost; the divergence, which has no
direction, only says how far the model has moved. Both with quantizers off, which shows what training did, and on, which
shows what quantization adds. p is taken once and kept on disk, so that no second model stays in memory: of each token the
top k, all others counted as one outcome (which can only make the divergence smaller).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatrun.files import reading, whole_file
from qatrun.model import text_config
from qatrun.ranks import world

T = TypeVar("T")
LOGITS_AT_ONCE = 2**26  # values, which bounds the memory that a probe takes


@dataclass(frozen=True)
class Probe:
    """What the start model says about the text.

    Attributes:
        input_ids: [num, seq_len] int64.
        likeliest: [num, seq_len, k] int32, its likeliest next tokens.
        log_probs: [num, seq_len, k] float32, of those.
        nll: [num] float32, of each sequence, nats a token.
    """

    input_ids: Tensor
    likeliest: Tensor
    log_probs: Tensor
    nll: Tensor

    @classmethod
    @torch.no_grad()
    def of_start(
        cls, model: Any, input_ids: Tensor, top_k: int, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Probe:
        """Ask the start model, computing as training does; leaves it in the mode it was in."""

        def kept(logits: Tensor, ids: Tensor, _: slice) -> tuple[Tensor, Tensor, Tensor]:
            log_p = logits.log_softmax(-1)
            top = log_p.topk(min(top_k, logits.shape[-1]), dim=-1)
            return top.indices.int().cpu(), top.values.cpu(), _nll(log_p, ids).cpu()

        found = zip(*_asked(model, input_ids, autocast, kept), strict=True)
        return cls(input_ids, *(torch.cat(parts) for parts in found))

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
            parts = load_file(file)
            if "nll" not in parts:
                raise ValueError("an earlier version wrote it, which kept no loss of the start model")
            return cls(**parts)

    @property
    def start_nll(self) -> float:
        """Of the start model, nats a token."""
        return float(self.nll.double().mean())

    @torch.no_grad()
    def ask(self, model: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> tuple[float, float]:
        """(NLL, KL from the start model), nats a token, of the model as it computes now; leaves its mode as it was."""

        def nats(logits: Tensor, ids: Tensor, rows: slice) -> tuple[float, float]:
            log_q = logits.log_softmax(-1)
            kl = _kl(log_q, self.likeliest[rows], self.log_probs[rows])
            return float(_nll(log_q, ids).double().sum()), float(kl.double().sum())

        nll, kl = (sum(values) for values in zip(*_asked(model, self.input_ids, autocast, nats), strict=True))
        return nll / len(self.input_ids), kl / self.input_ids.numel()


def _asked(
    model: Any,
    input_ids: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
    keep: Callable[[Tensor, Tensor, slice], T],
) -> list[T]:
    """What is kept of the logits, [batch, seq_len, vocab] float32, of some rows of the text; as many at once as memory
    permits, shared out over the processes."""
    device, num = next(model.parameters()).device, len(input_ids)
    at_once = max(1, LOGITS_AT_ONCE // (input_ids.shape[1] * text_config(model).vocab_size))
    was_training = model.training

    def ask(rows: slice) -> T:
        ids = input_ids[rows].to(device)
        with autocast():
            logits = model(input_ids=ids, use_cache=False).logits
        return keep(logits.float(), ids, rows)

    model.eval()
    try:
        return world().shared_out([slice(first, first + at_once) for first in range(0, num, at_once)], ask)
    finally:
        model.train(was_training)


def _nll(log_probs: Tensor, ids: Tensor) -> Tensor:
    """[batch] mean nats of each token given those before it, of [batch, seq_len, vocab] log-probabilities."""
    return -log_probs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1)


def _kl(log_q: Tensor, likeliest: Tensor, log_probs: Tensor) -> Tensor:
    """[batch, seq_len] nats; one outcome for each of the k, and one for all others together."""
    p_log = log_probs.to(log_q.device)
    q_log = log_q.gather(-1, likeliest.to(log_q.device).long())
    named = (p_log.exp() * (p_log - q_log)).sum(-1)
    p_rest, q_rest = (1 - log.exp().sum(-1) for log in (p_log, q_log))
    tiny = torch.finfo(torch.float32).eps  # sums of float32 probabilities are no better than this
    p_rest, q_rest = p_rest.clamp(min=0.0), q_rest.clamp(min=tiny)
    return named + torch.where(p_rest > tiny, p_rest * (p_rest / q_rest).log(), 0.0)
