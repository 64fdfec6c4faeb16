"""Small models, a tokenizer and a few steps of training, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from qatrun.quant import Mode, QuantState

VOCAB_SIZE = 101
SEQ_LEN = 16


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    """Two blocks, grouped queries, tied embeddings; float32, in eval mode, the same weights at every call."""
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**config | settings)).eval()


def tiny_gpt2(**settings: Any) -> GPT2LMHeadModel:
    """Two blocks of Conv1D, without dropout; float32, in eval mode, the same weights at every call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(
        GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0, use_cache=False, **settings)
    ).eval()


def tiny_mixtral(**settings: Any) -> MixtralForCausalLM:
    """Two blocks of four experts, two to a token; float32, in eval mode, the same weights at every call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts, use_cache=False, **settings))
    return model.eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w1, w2, ... of a vocabulary of VOCAB_SIZE; no pad token."""
    words = ["<eos>", "<unk>", *(f"w{i}" for i in range(1, VOCAB_SIZE - 1))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def token_ids(batch_size: int = 2, seed: int = 0) -> Tensor:
    """[batch_size, SEQ_LEN] random token ids."""
    return torch.randint(VOCAB_SIZE, (batch_size, SEQ_LEN), generator=torch.Generator().manual_seed(seed))


def quantized_steps(model: Any, state: QuantState, num_steps: int = 3, learning_rate: float = 0.1) -> None:
    """A few SGD steps in training mode, each on another batch, with one push of the history a step."""
    model.train()
    state.enter(Mode.QUANTIZE)
    for step in range(num_steps):
        tokens = token_ids(seed=step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= learning_rate * parameter.grad
        model.zero_grad(set_to_none=True)
        state.push()


def with_parameters_in(model: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters cast and its buffers (rotary frequencies) left in float32, as `from_pretrained`
    makes it and `model.to` does not."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    """[batch, seq, vocab] in eval mode."""
    result: Tensor = model.eval()(input_ids=token_ids() if tokens is None else tokens).logits
    return result
