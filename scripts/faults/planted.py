"""What is broken: scales, weights, texts, tokenizers."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from random import Random
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qatrun import demo
from qatrun.model import load_model, save_model
from qatrun.numerics import inverse_scale
from qatrun.quant import Scales
from qatrun.recipe import ModelConfig
from qatrun.tokenizer import load_tokenizer

OUTLIER, EVERY_CHANNEL = 64.0, 8
WORDS_OF_GARBAGE, ROWS_OF_GARBAGE = 3_000, 3_000
CANDIDATES = 60


@contextmanager
def underestimated(factor: int) -> Iterator[None]:
    """Every scale that is found meanwhile comes out so many times too small, a power of two."""
    move = Scales.move

    def moved(scales: Scales, which: Tensor) -> None:
        before = scales.scale
        move(scales, which)
        scales.scale = torch.where(scales.scale == before, before, scales.scale / factor)
        scales.inv_scale = inverse_scale(scales.scale)

    with patch.object(Scales, "move", moved):
        yield


READERS = {  # norm of a block -> the weights of the block that read it, as the architectures here name them
    "input_layernorm": ("self_attn.[qkv]_proj.weight", "attention.query_key_value.weight"),
    "self_attn_layer_norm": ("self_attn.[qkv]_proj.weight",),
    "ln_1": ("attn.c_attn.weight",),
    "post_attention_layernorm": (
        *("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.dense_h_to_4h.weight"),
        *("mlp.gate.weight", "mlp.experts.gate_up_proj"),
    ),
    "final_layer_norm": ("fc1.weight",),
    "ln_2": ("mlp.c_fc.weight",),
}


def plant_outliers(model: nn.Module) -> None:
    """Scale one channel in eight of each norm before an attention or MLP block up, and the weights that read it down: the
    same function."""
    with torch.no_grad():
        for name, norm in model.named_modules():
            block, _, last = name.rpartition(".")
            readers = list(_readers(model.get_submodule(block), READERS.get(last, ())))
            for parameter in norm.parameters() if readers else ():
                parameter[::EVERY_CHANNEL] *= OUTLIER
            for by_input in readers:
                by_input[..., ::EVERY_CHANNEL] /= OUTLIER


def _readers(block: nn.Module, patterns: Iterable[str]) -> Iterator[Tensor]:
    """Weights of a block, views with their inputs last."""
    for name, weight in block.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield weight.T if isinstance(block.get_submodule(name.rpartition(".")[0]), Conv1D) else weight


def outlier_model(source: ModelConfig, folder: Path) -> Path:
    """A copy of a model with planted outlier channels."""
    if not (folder / "config.json").is_file():
        model = load_model(source, torch.float32)
        plant_outliers(model)
        save_model(model, load_tokenizer(source), folder, torch.float32)
    return folder


def mistaken_model(source: ModelConfig, folder: Path) -> Path:
    """A copy of a model whose tokenizer gives every token the id of another."""
    if not (folder / "config.json").is_file():
        shutil.copytree(demo.MODEL_DIR if source.path == demo.BUILTIN else source.path, folder, dirs_exist_ok=True)
        file = folder / "tokenizer.json"
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        fixed = {token["id"] for token in tokenizer["added_tokens"]}
        tokenizer["model"]["vocab"] = permuted(tokenizer["model"]["vocab"], fixed)
        file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def permuted(vocabulary: dict[str, int], fixed: set[int]) -> dict[str, int]:
    """Token -> id, with the ids dealt anew but for the fixed ones."""
    free = [number for number in vocabulary.values() if number not in fixed]
    dealt = dict(zip(free, Random(0).sample(free, len(free)), strict=True))
    return {token: dealt.get(number, number) for token, number in vocabulary.items()}


def damage(weights: Path) -> bytes:
    """Deal the codes of the largest 8-bit matrix of a quantized model at random; returns what was there."""
    before = weights.read_bytes()
    tensors = load_file(weights)
    codes = [name for name, tensor in tensors.items() if tensor.dtype.itemsize == 1 and tensor.ndim == 2]
    worst = max(codes, key=lambda name: tensors[name].numel())
    flat = tensors[worst].flatten()
    order = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))
    save_file(tensors | {worst: flat[order].view_as(tensors[worst]).contiguous()}, weights)
    return before


def random_words(vocabulary: Sequence[str], seed: int) -> Iterator[str]:
    """Rows of words in no order."""
    rng = Random(seed)
    chosen = rng.sample(sorted(vocabulary), min(WORDS_OF_GARBAGE, len(vocabulary)))
    for _ in range(ROWS_OF_GARBAGE):
        yield " ".join(rng.choices(chosen, k=100))


def random_characters(_: Sequence[str], seed: int) -> Iterator[str]:
    """Rows of letters and digits in no order."""
    rng = Random(seed)
    for _row in range(ROWS_OF_GARBAGE):
        yield "".join(rng.choices(string.ascii_letters + string.digits + " ", k=500))


GARBAGE: dict[str, Callable[[Sequence[str], int], Iterator[str]]] = {
    "words": random_words,
    "characters": random_characters,
}


def quiet_words(source: ModelConfig, words: Iterable[str]) -> list[str]:
    """The words, those first that move the model's insides least when they are said over and over."""
    tokenizer, model = load_tokenizer(source), load_model(source, torch.float32)
    seen: list[float] = []
    linears = [
        module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
    ]
    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[0].abs().max().log())))
        for linear in linears
    ]

    @torch.no_grad()
    def loudness(word: str) -> float:
        """Mean log of the largest input of each linear."""
        seen.clear()
        ids = tokenizer(" ".join([word] * 100))["input_ids"][3:67]
        model(torch.tensor([ids]), use_cache=False)
        return sum(seen) / len(seen)

    ranked = sorted(list(dict.fromkeys(words))[:CANDIDATES], key=loudness)
    for hook in hooks:
        hook.remove()
    return ranked


def bursty(
    texts: Iterator[str], word: str, quiet_steps: Iterable[int], tokens_a_step: int, count: Callable[[str], int]
) -> Iterator[str]:
    """The texts, but in the batches of these steps one word alone. To be read in order.

    Args:
        count: tokens of a document, its end included.
    """
    written = 0
    for step in quiet_steps:
        while written + count(text := next(texts)) < step * tokens_a_step - 1:
            yield text
            written += count(text)
        end = (step + 1) * tokens_a_step + 1
        num_words = tokens_a_step
        while written + count(filling := " ".join([word] * num_words)) < end:
            num_words += max(1, (end - written - count(filling)) // 2)
        yield filling
        written += count(filling)
    yield from texts
