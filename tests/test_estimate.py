"""What `check` says of memory, against peaks that were measured (`scripts/measure_world.py`; CPU, torch 2.13)."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from qatrun.recipe import parse_recipe
from qatrun.study.estimate import memory_bytes

SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
WIDE = {"hidden_size": 1536, "intermediate_size": 6144, "num_attention_heads": 12}


def estimated(
    shape: dict[str, int], vocab: int, layers: int, tokens: tuple[int, int], processes: int, *, tied: bool, again: bool
) -> float:
    """MiB, of HiF8 QAT of a Llama of that shape with the published one's attention where it is wide."""
    heads = {"num_key_value_heads": 6, "head_dim": 128} if shape is WIDE else {}
    config = LlamaConfig(**shape, **heads, vocab_size=vocab, num_hidden_layers=layers, tie_word_embeddings=tied)
    hidden, kv = shape["hidden_size"], shape["hidden_size"] // (2 if heads else 1)
    quantized = layers * (2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * shape["intermediate_size"])
    sizes = {"global_batch_size": 8, "micro_batch_size": tokens[0], "gradient_checkpointing": again}
    recipe = parse_recipe(
        {
            "name": "estimated",
            "model": {"path": "random"},
            "data": {"train": {"path": "random"}, "seq_len": tokens[1]},
            "train": {"steps": 1, "lr_warmup_steps": 0, **sizes},
            "warmup": {"steps": 0},
            "eval": {"tasks": {"none": 0}},
        }
    )
    num_parameters = quantized + vocab * hidden * (1 if tied else 2)
    return (
        memory_bytes(recipe.arm_by_name["hif8"], num_parameters, quantized, config, processes)["qat training"] / 2**20
    )


@pytest.mark.parametrize(
    ("shape", "vocab", "layers", "tokens", "processes", "tied", "again", "measured"),
    [
        (SMALL, 8192, 8, (4, 128), 1, True, False, 969),
        (SMALL, 8192, 8, (4, 128), 1, True, True, 812),
        (SMALL, 8192, 8, (4, 128), 2, True, False, 786),
        (SMALL, 100_000, 2, (1, 64), 1, True, False, 1459),
        (SMALL, 100_000, 2, (1, 64), 1, False, False, 2167),
        (SMALL, 100_000, 2, (1, 64), 2, True, False, 1275),
        (WIDE, 153_376, 2, (1, 64), 1, True, False, 6720),
        (WIDE, 153_376, 2, (1, 64), 2, True, False, 4864),
    ],
)
def test_memory_is_estimated_within_a_fifth(
    shape: dict[str, int],
    vocab: int,
    layers: int,
    tokens: tuple[int, int],
    processes: int,
    tied: bool,
    again: bool,
    measured: int,
) -> None:
    found = estimated(shape, vocab, layers, tokens, processes, tied=tied, again=again)
    assert found == pytest.approx(measured, rel=0.2)
