"""Whether a model predicts each token from those before it alone: else it reads the answers that it is trained on."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn

from qatrun.model.config import refuse, text_config
from qatrun.recipe import ModelConfig

NUM_TOKENS = 8
NOISE = {
    torch.float32: 1e-5,
    torch.bfloat16: 0.1,
    torch.float16: 0.02,
}  # of the largest logit; experts are shared out anew


def check_causal(model: ModelConfig, built: nn.Module) -> None:
    """Refuse an encoder by its config: the architectures that can be one ask it for `is_decoder`, or for `causal`.

    Raises:
        InputError: it says that attention goes both ways.
    """
    config: Any = built.config
    for key in ("is_decoder", "causal"):
        if getattr(config, key, None) is False and _asks_for(built, key):
            message = (
                f"an encoder ({key} is false): each token sees those after it, so that a loss on the next token means "
                f"nothing; set {key}: true in config.json if it was trained as a decoder"
            )
            refuse(model, [message])


@torch.no_grad()
def sees_the_future(model: Any) -> bool:
    """Whether another last token changes the logits of the tokens before it, in eval mode, beyond rounding."""
    vocabulary = text_config(model).vocab_size
    tokens = torch.arange(NUM_TOKENS).unsqueeze(0) % vocabulary
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + vocabulary // 2) % vocabulary
    with torch.random.fork_rng(devices=[]):
        one, two = (_logits(model, ids)[0, :-1] for ids in (tokens, other))
    limit = NOISE.get(model.dtype, NOISE[torch.bfloat16]) * one.abs().max()
    return bool((one - two).abs().max() > limit)


def _logits(model: Any, ids: Tensor) -> Tensor:
    """[1, NUM_TOKENS, vocab] float32."""
    torch.manual_seed(0)  # some hash at random
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _asks_for(built: nn.Module, key: str) -> bool:
    """Whether the code of its module reads this entry of the config, examples in its documentation aside."""
    try:
        source = inspect.getsource(sys.modules[type(built).__module__])
    except (OSError, TypeError, KeyError):
        return False
    return re.search(rf"^(?!\s*>>>).*config\.{key}\b", source, re.MULTILINE) is not None
