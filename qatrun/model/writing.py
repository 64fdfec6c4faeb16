"""What a model writes by itself: a sample of its own distribution, and so text of the kind that it knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from qatrun.errors import InputError
from qatrun.model.config import sentence


@torch.no_grad()
def write_text(model: Any, first: int, num: int, seq_len: int, *, seed: int, batch_size: int) -> Tensor:
    """[num, seq_len] int64 token ids on the CPU, each drawn from all that the model holds possible after those before it
    (temperature 1, no token left out), so that their mean NLL is the model's own entropy. The end of a text is a token
    like others, after which the next one begins.

    Args:
        model: in eval mode.
        first: the token that each sequence begins with.
        batch_size: sequences at once.
    Raises:
        InputError: it cannot write.
    """
    device = next(model.parameters()).device
    begun = torch.full((num, 1), first, device=device)
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=seq_len, use_cache=True, pad_token_id=first
    )
    # A checkpoint's own settings (where to stop, penalties) fill in what a call leaves open.
    kept, model.generation_config = getattr(model, "generation_config", None), GenerationConfig()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            parts = begun.split(batch_size)
            written = torch.cat(
                [model.generate(p, attention_mask=torch.ones_like(p), generation_config=settings).cpu() for p in parts]
            )
    except Exception as error:  # the code of any model
        raise InputError(f"it cannot write text: {sentence(error)}") from error
    finally:
        model.generation_config = kept
    if written.shape != (num, seq_len):
        raise InputError(f"it wrote {written.shape[1]} tokens of {seq_len}")
    return written
