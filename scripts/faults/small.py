"""Small models that are made here, in a few minutes each, and the questions that they are asked: which line, or sentence,
comes next?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qatrun.data import PackedStream, open_data
from qatrun.files import filled_folder
from qatrun.recipe import DataConfig, Source

if TYPE_CHECKING:
    from faults.models import Question

VOCABULARY, CONTEXT = 1024, 256
STEPS, BATCH, SEQ_LEN, RATE = 400, 16, 128, 3e-3
LARGER = 4096  # tokens of a vocabulary
SHOWN_LINES = 6
END = "<|endoftext|>"


def make_model(
    folder: Path, texts: Iterable[str], build: Callable[[int], PreTrainedModel], vocabulary: int = VOCABULARY
) -> None:
    """Train tokenizer and model, unless they are there.

    Args:
        build: id of the token that ends a text -> a model with random weights.
        vocabulary: how many tokens it has.
    """
    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    kept = list(texts)
    tokenizer = _train_tokenizer(kept, vocabulary)
    model = build(tokenizer.eos_token_id).train()
    learned = folder.with_name("learned.jsonl")
    learned.parent.mkdir(parents=True, exist_ok=True)
    learned.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept), encoding="utf-8")
    data = DataConfig(train=Source(path=str(learned)), seq_len=SEQ_LEN, valid_sequences=1)
    _train(model, open_data(data, tokenizer, seed=0).train)
    with filled_folder(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def gpt_neox(end: int) -> PreTrainedModel:
    """0.8M parameters, rotary positions, attention and MLP side by side."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


def gpt2(end: int) -> PreTrainedModel:
    """1.0M parameters, learned positions, linears stored as [in, out], head and embeddings one."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=128,
            n_layer=4,
            n_head=4,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


def qwen3(end: int) -> PreTrainedModel:
    """4.8M parameters, normalized queries and keys, four of them to a value, head and embeddings one."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=LARGER,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


def opt(end: int) -> PreTrainedModel:
    """0.9M parameters, ReLU, biases, learned positions, head and embeddings one."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            ffn_dim=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            word_embed_proj_dim=128,
            dropout=0.0,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def mixtral(end: int) -> PreTrainedModel:
    """2.0M parameters, four experts of which two answer for a token."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


def _train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, model_max_length=CONTEXT)


def _train(model: PreTrainedModel, stream: PackedStream) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        batch = stream.take(BATCH)
        model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def sentences(text: str) -> list[str]:
    """Parted where one ends."""
    return re.split(r"(?<=[.!?])\s+", text)


def what_comes_next(
    texts: Iterable[str], count: int, parts: Callable[[str], list[str]] = str.splitlines
) -> list[Question]:
    """Which of four lines comes after some lines of a text: three are lines of the texts before.

    Args:
        parts: text -> lines, or what stands for them.
    """
    rng = Random(count)
    questions: list[Question] = []
    others = ["pass", "return None", "import os"]
    parted = [[line for line in parts(text) if line.strip()] for text in texts]
    for lines in cycle([lines for lines in parted if len(lines) > SHOWN_LINES]):
        at = rng.randrange(SHOWN_LINES, len(lines))
        right = lines[at].strip()
        wrong = rng.sample(sorted({line for line in others if line != right}), 3)
        answer = rng.randrange(4)
        choices = [*wrong[:answer], right, *wrong[answer:]]
        questions.append({"query": "\n".join(lines[at - SHOWN_LINES : at]), "choices": choices, "answer": answer})
        others = [*others[-200:], *(line.strip() for line in rng.sample(lines, 3) if len(line.strip()) > 3)]
        if len(questions) == count:
            break
    return questions


def write_task(folder: Path, items: Sequence[Question], name: str = "next_line") -> Path:
    """An lm-eval task file, beside its items."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    task = folder / f"{name}.yaml"
    task.write_text(
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data.resolve()))}}}}}\n"
        "output_type: multiple_choice\n"
        "test_split: test\n"
        "doc_to_text: query\n"
        "doc_to_choice: choices\n"
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc}]\n"
    )
    return task
