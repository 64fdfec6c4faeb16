"""Negative log-likelihood of token sequences, kept sequence by sequence so that two models can be paired on them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from qatrun.data import IGNORE_INDEX, Batch
from qatrun.errors import NonFiniteError
from qatrun.evaluate.context import evaluation_mode
from qatrun.files import read_json, write_json
from qatrun.layout import TEXT_FILE
from qatrun.model import text_config
from qatrun.ranks import world
from qatrun.records.scores import STRATA, TextScore, TextScores


def score_texts(
    model: PreTrainedModel, texts: Mapping[str, Batch], *, batch_size: int, output_dir: Path | None = None
) -> TextScores:
    """Score a model on each of these texts, as it is: its dtype, its device, its quantizers on or off.

    Args:
        texts: name -> sequences without padding. One that is empty is left out.
        output_dir: where to keep the scores.
    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    once = {id(text): _score(model, text, batch_size) for text in texts.values() if text.num_targets}
    scored = {name: once[id(text)] for name, text in texts.items() if text.num_targets}
    found = TextScores(texts=scored)
    if output_dir is not None:
        write_json(output_dir / TEXT_FILE, found)
    return found


def load_texts(folder: Path) -> TextScores:
    """What `score_texts` kept.

    Raises:
        DamagedFileError: it is missing or torn.
    """
    return read_json(folder / TEXT_FILE, TextScores)


def mean_nll(model: PreTrainedModel, sequences: Tensor, *, batch_size: int, labels: Tensor | None = None) -> float:
    """Mean negative log-likelihood of each token of each sequence given those before it, nats; log-softmax in float32.

    Args:
        model: put in eval mode meanwhile; runs in its own dtype, on its own device.
        sequences: [num_sequences, seq_len] int64 token ids, without padding.
        labels: same shape, not shifted; IGNORE_INDEX where a token does not count. None: every token counts.
    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    return _score(model, Batch(sequences, sequences if labels is None else labels), batch_size).mean


def perplexity(nats: float) -> float:
    """exp, and infinity beyond what a float holds."""
    return math.exp(nats) if nats < 700.0 else math.inf


@torch.no_grad()
def _score(model: PreTrainedModel, text: Batch, batch_size: int) -> TextScore:
    with evaluation_mode(model):
        nll = torch.cat(world().shared_out(text.split(batch_size), lambda part: _token_nll(model, part)))
    if not torch.isfinite(nll).all():
        raise NonFiniteError("the model's logits are NaN or infinite on the held-out text")
    targets = text.labels[:, 1:]
    stratum, entropy = _frequencies(targets)
    of_stratum = [stratum == number for number in range(len(STRATA))]
    return TextScore(
        text=hashlib.sha256(text.input_ids.numpy().tobytes() + text.labels.numpy().tobytes()).hexdigest(),
        nats=torch.stack([(nll * here).sum(dim=1) for here in of_stratum], dim=1).tolist(),
        num_targets=torch.stack([here.sum(dim=1) for here in of_stratum], dim=1).tolist(),
        entropy=entropy,
        uniform=math.log(text_config(model).vocab_size),
    )


def _token_nll(model: PreTrainedModel, text: Batch) -> Tensor:
    """[batch, seq_len - 1] float64 nats, 0 where ignored."""
    logits = model(input_ids=text.input_ids.to(model.device), use_cache=False).logits[:, :-1].float()
    targets = text.labels[:, 1:].to(model.device)
    nll = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return nll.double().cpu()


def _frequencies(targets: Tensor) -> tuple[Tensor, float]:
    """How often the targets' tokens occur among them: the stratum of each target, -1 where ignored, and the entropy in nats.

    Tokens in the order of their frequency are cut where a third of the targets has passed, so that the strata hold about
    as many targets each; all targets of one token are in one stratum.
    """
    counted = targets != IGNORE_INDEX
    tokens, place, counts = torch.unique(targets[counted], return_inverse=True, return_counts=True)
    share = counts.double() / counts.sum()
    order = share.argsort(descending=True, stable=True)
    of_token = torch.empty_like(tokens)
    middle = share[order].cumsum(0) - share[order] / 2
    of_token[order] = (middle * len(STRATA)).long().clamp(max=len(STRATA) - 1)
    stratum = torch.full_like(targets, -1)
    stratum[counted] = of_token[place]
    return stratum, float(-(share * share.log()).sum())
