"""What training makes small: a sum over the targets of a batch, divided by how many those are."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from qatrun.data import IGNORE_INDEX, Batch


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
        predictions = logits[:, :-1].float().flatten(0, 1)
        targets = batch.labels[:, 1:].flatten()
        return F.cross_entropy(predictions, targets, ignore_index=IGNORE_INDEX, reduction="sum")
