"""What training makes small: a sum over the targets of a batch, divided by how many those are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qatrun.data import IGNORE_INDEX, Batch
from qatrun.train.chunks import CHUNK, CHUNKED_FROM


class Objective(Protocol):
    """A loss that is a mean over a whole batch, and is summed up a micro-batch at a time."""

    def size(self, batch: Batch) -> int:
        """What the sums of a whole batch are divided by; at least 1."""

    def summed(self, logits: Tensor, batch: Batch) -> Tensor:
        """[] float32, with its graph: the sum over a micro-batch.

        Args:
            logits: [num, seq_len, vocab], the model's for `batch`, which lies on the same device.
        """


class CrossEntropy:
    """Of each next token. This is where labels are shifted, once."""

    def size(self, batch: Batch) -> int:
        return max(1, batch.num_targets)

    def summed(self, logits: Tensor, batch: Batch) -> Tensor:
        if logits.numel() > CHUNKED_FROM:
            targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # of the last there is none
            chunked: Tensor = _ChunkedCrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
            return chunked
        return _cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The same with no more than a chunk of the logits in float32 at once; gradients are equal to the bit, the loss up to
    the order of its sum. Beside the logits only their gradient is as large, in their own dtype."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return torch.stack([_cross_entropy(*chunk) for chunk in _chunks(logits, targets)]).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows, of_rows, into in _chunks(logits, targets, gradient):
            with torch.enable_grad():
                leaf = rows.detach().float().requires_grad_()
                loss = _cross_entropy(leaf, of_rows)
            into.copy_(torch.autograd.grad(loss, leaf, upstream[0])[0])
        return gradient, None


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of [num_tokens, vocab], and of what belongs to them."""
    num_rows = max(1, CHUNK // logits.shape[1])
    return zip(logits.split(num_rows), *(other.split(num_rows) for other in others), strict=True)


def _cross_entropy(predictions: Tensor, targets: Tensor) -> Tensor:
    """[] float32, the sum over rows of [num_tokens, vocab]."""
    return F.cross_entropy(predictions.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
