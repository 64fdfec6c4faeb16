"""Whether a tokenizer belongs to a model, by what comes back of the model's own writing."""

from __future__ import annotations

import json
from itertools import islice
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, PreTrainedTokenizerFast

from qatrun import demo
from qatrun.study.tokenizer_fit import come_back, fits

END = "<end>"


class Bigrams(nn.Module):
    """Knows which token follows which in a text."""

    def __init__(self, ids: list[int], size: int) -> None:
        super().__init__()
        self.config, self.device = GPT2Config(vocab_size=size), torch.device("cpu")
        counts = torch.full((size, size), 1e-3)
        counts.index_put_((torch.tensor(ids[:-1]), torch.tensor(ids[1:])), torch.tensor(1.0), accumulate=True)
        self.chances = counts / counts.sum(dim=1, keepdim=True)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.chances.log()[input_ids])

    def write(self, num: int, length: int) -> torch.Tensor:
        torch.manual_seed(0)
        written = [torch.randint(len(self.chances), (num,))]
        for _ in range(length - 1):
            written.append(torch.multinomial(self.chances[written[-1]], 1).squeeze(1))
        return torch.stack(written, dim=1)


def syllables(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def renamed(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokens, each with the id of another."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token in whole["model"]["vocab"] if token != END]
    ids = Random(0).sample([whole["model"]["vocab"][token] for token in tokens], len(tokens))
    whole["model"]["vocab"] |= dict(zip(tokens, ids, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)), eos_token=END)


@pytest.fixture(scope="module")
def world() -> tuple[PreTrainedTokenizerFast, Bigrams, torch.Tensor]:
    texts = list(islice(demo.documents("pretrain"), 600))
    tokenizer = syllables(texts)
    model = Bigrams(tokenizer(" ".join(texts))["input_ids"], len(tokenizer))
    return tokenizer, model, model.write(16, 64)


def test_the_own_tokenizer_is_known_and_another_is_not(world: Any) -> None:
    tokenizer, model, own = world
    assert fits(model, tokenizer, own, batch_size=8)
    assert not fits(model, renamed(tokenizer), own, batch_size=8)
    others = syllables([text[::-1] for text in islice(demo.documents("pretrain"), 600)])
    assert not fits(model, others, own, batch_size=8)


def test_where_every_token_is_a_word_nothing_is_known() -> None:
    tokenizer = word_tokenizer()
    model = Bigrams(list(range(2, 90)) * 20, len(tokenizer))
    assert not fits(model, tokenizer, model.write(8, 32).clamp(min=2), batch_size=8)


def test_tokens_that_the_model_has_not_do_not_fit(world: Any) -> None:
    tokenizer, model, own = world
    model.config.vocab_size = 300
    try:
        assert not fits(model, tokenizer, own, batch_size=8)
    finally:
        model.config.vocab_size = len(tokenizer)


def test_what_comes_back_begins_as_it_did_and_is_cut(world: Any) -> None:
    tokenizer, _, own = world
    back = come_back(tokenizer, own)
    assert back.shape == (16, 48)
    assert torch.equal(back[:, 0], own[:, 0])
    assert (back == own[:, :48]).float().mean() > 0.5
