"""What training makes small: a sum over the targets of a batch, divided by how many those are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qatrun.data import IGNORE_INDEX, Batch
from qatrun.train.chunks import CHUNK, CHUNKED_FROM

# [num_tokens, vocab] logits, [num_tokens] targets, and what else has a row for each token -> [num_terms] float32 sums.
OfRows = Callable[..., Tensor]


class Objective(Protocol):
    """A loss that is a mean over a whole batch, and is summed up a micro-batch at a time."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of what is summed, as metrics have them: `loss`, which is always the cross-entropy, and others."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each term in what is made small; one of weight 0 is only measured, and needs no gradient."""

    def size(self, batch: Batch) -> int:
        """What the sums of a whole batch are divided by; at least 1."""

    def summed(self, logits: Tensor, batch: Batch) -> Tensor:
        """[num_terms] float32, with their graph: the sums over a micro-batch.

        Args:
            logits: [num, seq_len, vocab], the model's for `batch`, which lies on the same device.
        """


class CrossEntropy:
    """Of each next token. This is where labels are shifted, once."""

    terms = ("loss",)
    weights = (1.0,)

    def size(self, batch: Batch) -> int:
        return max(1, batch.num_targets)

    def summed(self, logits: Tensor, batch: Batch) -> Tensor:
        return _summed(_of_targets, batch, logits)


@dataclass(frozen=True)
class Distillation:
    """Cross-entropy, and the divergence from a teacher's probabilities of the same tokens (Hinton et al., arXiv:1503.02531):

        (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || model)

    with the logits of both over the temperature. The factor keeps the size of the gradient whatever the temperature.

    Attributes:
        teacher: [num, seq_len] token ids -> [num, seq_len, vocab] logits, on the same device, without a graph.
    """

    teacher: Callable[[Tensor], Tensor]
    weight: float
    temperature: float

    @property
    def terms(self) -> tuple[str, ...]:
        return ("loss", "distill_kl")

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0 - self.weight, self.weight * self.temperature**2)

    def size(self, batch: Batch) -> int:
        return CrossEntropy().size(batch)

    def summed(self, logits: Tensor, batch: Batch) -> Tensor:
        return _summed(self._of_targets, batch, logits, self.teacher(batch.input_ids))

    def _of_targets(self, logits: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
        terms = (lambda: _cross_entropy(logits, targets), lambda: self._divergence(logits, targets, teacher))
        sums = []
        for weight, term in zip(self.weights, terms, strict=True):
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
                sums.append(term())
        return torch.stack(sums)

    def _divergence(self, logits: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
        """[] float32 nats, KL(teacher || model) summed over the rows that have a target."""
        log_p, log_q = ((x.float() / self.temperature).log_softmax(-1) for x in (teacher, logits))
        rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return rows.masked_fill(targets == IGNORE_INDEX, 0.0).sum()


def _summed(of_rows: OfRows, batch: Batch, *by_token: Tensor) -> Tensor:
    """[num_terms] over all targets; `by_token`: [num, seq_len, vocab], of what the model says first."""
    logits = by_token[0]
    if logits.numel() > CHUNKED_FROM:
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # of the last there is none
        flat, *others = (x.flatten(0, 1) for x in by_token)
        chunked: Tensor = _Chunked.apply(of_rows, flat, targets.flatten(), *others)
        return chunked
    predictions, *others = (x[:, :-1].flatten(0, 1) for x in by_token)
    return of_rows(predictions, batch.labels[:, 1:].flatten(), *others)


class _Chunked(torch.autograd.Function):
    """The same with no more than a chunk of the logits in float32 at once; gradients are equal to the bit, the sums up to
    their order. Beside the logits only their gradient is as large, in their own dtype."""

    @staticmethod
    def forward(ctx: Any, of_rows: OfRows, logits: Tensor, *others: Tensor) -> Tensor:
        ctx.of_rows = of_rows
        ctx.save_for_backward(logits, *others)
        return torch.stack([of_rows(*chunk) for chunk in _chunks(logits, *others)]).sum(0)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, *others = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for into, rows, *of_rows in _chunks(gradient, logits, *others):
            with torch.enable_grad():
                leaf = rows.detach().float().requires_grad_()
                terms = ctx.of_rows(leaf, *of_rows)
            into.copy_(torch.autograd.grad(terms, leaf, upstream[0])[0])
        return None, gradient, *(None for _ in others)


def _chunks(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of [num_tokens, vocab], and of what belongs to them."""
    num_rows = max(1, CHUNK // first.shape[1])
    return zip(first.split(num_rows), *(other.split(num_rows) for other in others), strict=True)


def _of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    return _cross_entropy(logits, targets)[None]


def _cross_entropy(predictions: Tensor, targets: Tensor) -> Tensor:
    """[] float32, the sum over rows of [num_tokens, vocab]."""
    return F.cross_entropy(predictions.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
