"""Pretrain the demo model: a small Llama, from random weights, on the demo world's text (minutes on two CPU cores).

    python scripts/pretrain_demo.py                       # writes qatrun/demo/model
    python scripts/pretrain_demo.py --steps 300 --output trial

torch.compile needs a C++ compiler. The weights differ a little between machines; the text and the questions do not.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qatrun import demo

EOS, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
SPLITS = ("pretrain", "finetune", "valid")
MAX_POSITIONS = 512


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose vocabulary is every word of the world, both slices and all questions."""
    texts = [text for split in SPLITS for text in demo.documents(split)]
    texts += [" ".join((item["query"], *item["choices"])) for task in demo.TASKS for item in demo.items(task)]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    vocabulary = {word: number for number, word in enumerate([EOS, PAD, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=MAX_POSITIONS,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About 2.7 million parameters: 4 blocks of width 256, grouped-query attention, tied embeddings."""
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # twice as fast as SDPA in the backward pass on CPU at this length
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, batch_size: int, seq_len: int) -> Iterator[Tensor]:
    """Packed batches [batch_size, seq_len] of the pretraining documents, an end token after each, without end."""
    size = batch_size * seq_len
    ids: list[int] = []
    while True:
        for text in demo.documents("pretrain"):
            ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            if len(ids) >= size:
                yield torch.tensor(ids[:size]).view(batch_size, seq_len)
                ids = ids[size:]


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warmup, then a cosine from 1 to 0.05."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: LlamaForCausalLM, data: Iterator[Tensor], settings: argparse.Namespace) -> list[dict[str, float]]:
    """Train in place, bf16 autocast over fp32 weights; returns the loss curve, each point the mean of 50 steps."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    factor: Callable[[int], float] = lambda step: lr_factor(step, settings.steps, settings.warmup_steps)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    compiled = torch.compile(model)
    curve, recent, start = [], [], time.monotonic()
    for step in range(1, settings.steps + 1):
        batch = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 50 == 0 or step == settings.steps:
            curve.append({"step": step, "loss": round(sum(recent) / len(recent), 4)})
            recent = []
            print(
                f"step {step}/{settings.steps}  loss {curve[-1]['loss']:.4f}  {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return curve


@torch.inference_mode()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[Any], batch_size: int = 64
) -> float:
    """Share of items whose answer is the likeliest choice (sum of its tokens' log-likelihoods after the query)."""
    right = 0
    for start in range(0, len(items), batch_size):
        group = items[start : start + batch_size]
        texts = [f"{item['query']} {choice}" for item in group for choice in item["choices"]]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        query_lengths = [len(tokenizer(item["query"])["input_ids"]) for item in group for _ in item["choices"]]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        log_likelihood = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        positions = torch.arange(1, ids.shape[1])
        in_choice = (positions >= torch.tensor(query_lengths)[:, None]) & mask[:, 1:].bool()
        scores = (log_likelihood * in_choice).sum(1).view(len(group), -1)
        right += int((scores.argmax(1) == torch.tensor([item["answer"] for item in group])).sum())
    return right / len(items)


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, log: dict[str, Any]) -> None:
    """Write the Hugging Face folder, weights in bfloat16, with the training log beside them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=demo.MODEL_DIR)
    parser.add_argument("--steps", type=int, default=1750)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    settings = parse_arguments()
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters, {len(tokenizer):,} words")
    start = time.monotonic()
    curve = train(model, batches(tokenizer, settings.batch_size, settings.seq_len), settings)
    seconds = time.monotonic() - start
    model = model.to(torch.bfloat16).eval()
    scores = {task: accuracy(model, tokenizer, demo.items(task)) for task in demo.TASKS}
    print(scores)
    log = {
        "settings": {key: value for key, value in vars(settings).items() if key != "output"},
        "num_parameters": num_parameters,
        "tokens": settings.steps * settings.batch_size * settings.seq_len,
        "seconds": round(seconds),
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads, bfloat16 autocast",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "loss": curve,
        "accuracy": scores,
    }
    save(settings.output, model, tokenizer, log)


if __name__ == "__main__":
    main()
