"""Mean NLL of held-out token sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from qatrun.data import IGNORE_INDEX
from qatrun.errors import NonFiniteError
from qatrun.evaluate.context import evaluation_mode
from qatrun.ranks import world


@torch.no_grad()
def mean_nll(model: PreTrainedModel, sequences: Tensor, *, batch_size: int, labels: Tensor | None = None) -> float:
    """Mean negative log-likelihood of each token of each sequence given those before it, nats; log-softmax in float32.
    Several processes share the batches.

    Args:
        model: put in eval mode meanwhile; runs in its own dtype, on its own device.
        sequences: [num_sequences, seq_len] int64 token ids, without padding.
        labels: same shape, not shifted; IGNORE_INDEX where a token does not count. None: every token counts.
    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    labels = sequences if labels is None else labels
    with evaluation_mode(model):
        batches = list(zip(sequences.split(batch_size), labels.split(batch_size), strict=True))
        nll = torch.cat(world().shared_out(batches, lambda batch: _token_nll(model, *batch)))
    if not torch.isfinite(nll).all():
        raise NonFiniteError("the model's logits are NaN or infinite on the held-out text")
    return float(nll.sum(dim=1).sum() / int((labels[:, 1:] != IGNORE_INDEX).sum()))


def _token_nll(model: PreTrainedModel, sequences: Tensor, labels: Tensor) -> Tensor:
    """[batch, seq_len] token ids and labels -> [batch, seq_len - 1] float64 nats, 0 where ignored."""
    logits = model(input_ids=sequences.to(model.device), use_cache=False).logits[:, :-1].float()
    targets = labels[:, 1:].to(model.device)
    nll = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return nll.double().cpu()
