"""What a run will need, estimated from shapes alone: tokens, memory, disk. Estimates, and called so wherever shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qatrun.recipe import Arm
from qatrun.train.chunks import CHUNK, CHUNKED_FROM

BYTES = {"float32": 4, "bfloat16": 2}
ADAMW_MOMENTS = 2
LIBRARIES = 200 * 2**20  # what they and the allocator take besides while they compute, as measured on CPUs


def memory_bytes(
    arm: Arm,
    num_parameters: int,
    quantized_weights: int,
    config: Any,
    processes: int = 1,
    teacher_parameters: int | None = None,
) -> dict[str, int]:
    """Peak memory by phase, of each process.

    Parameters, gradients and AdamW's moments are exact. The peak is the largest of three moments of a backward: at the
    output head (all activations and logits are there, and a gradient as large as the vocabulary in two dtypes), in the
    blocks, and at the embedding, whose gradient is as large again; one of a tied or sharded head waits for it. Of several
    processes each holds its part of the states. Embeddings and head it gathers from forward to backward, blocks one at a
    time and the next besides. A teacher has its weights, and logits at the head, as well. To be scored a model lies on each
    process whole.
    """
    parameter, compute = BYTES[arm.model.param_dtype], BYTES[arm.model.compute_dtype]
    cast = compute if compute != parameter else 0
    tied, sharded = getattr(config, "tie_word_embeddings", False), processes > 1
    embeddings: int = config.vocab_size * config.hidden_size
    outside: int = embeddings * (1 if tied else 2)
    blocks = max(0, num_parameters - outside)
    block = blocks // config.num_hidden_layers
    num_logits: int = arm.train.micro_batch_size * arm.data.seq_len * config.vocab_size
    of_teacher = 0 if teacher_parameters is None else num_logits * compute + 8 * min(num_logits, CHUNK)

    def training(quantized: int, saved_input: int) -> int:
        # Casts of weights that are not quantized stay for the backward, unless that computes them again.
        casts = cast * (max(0, blocks - quantized) if not arm.train.gradient_checkpointing else block)
        grids = compute * block if sharded else (saved_input * 8 + 1) * quantized // 8
        kept = _activations(arm, config, saved_input)
        head_waits = embeddings * parameter if tied or sharded else 0
        at_head = casts + kept + _logits(num_logits, compute) + of_teacher + embeddings * (2 * cast + parameter)
        in_blocks = casts + kept + head_waits + (4 * block * parameter if sharded else 0)
        at_embedding = head_waits + embeddings * parameter
        return grids + max(at_head, in_blocks, at_embedding)

    states = num_parameters * parameter * (2 + ADAMW_MOMENTS) // processes
    always = states + (outside * parameter if sharded else 0) + LIBRARIES
    if teacher_parameters is not None:  # gathered as the model is, and taken to be as large there
        always += compute * (teacher_parameters // processes + (outside + 2 * block if sharded else 0))
    codes = arm.qat is not None and arm.qat.saves_codes
    return {
        "bf16 training": always + training(0, compute),
        "qat training": always + training(quantized_weights, 1 if codes else compute),
        # Activations of one block at a time, and the logits: nothing waits for a backward.
        "calibration": num_parameters * (parameter + cast)
        + _activations(arm, config, compute) // config.num_hidden_layers
        + _logits(num_logits, compute),
        "scoring": num_parameters * compute,
    }


def _activations(arm: Arm, config: Any, saved_input: int) -> int:
    """Kept for the backward, of a block as Llama's, whose residual stream is in the dtype of the parameters: of each norm
    its input and its normalized input, of attention queries, keys, values and output (SDPA keeps no matrix), of the MLP
    gate, its activation and the other factor; inputs of linears, each once. With gradient checkpointing one block of it,
    and the input of each."""
    parameter, compute = BYTES[arm.model.param_dtype], BYTES[arm.model.compute_dtype]
    tokens = arm.train.micro_batch_size * arm.data.seq_len
    hidden: int = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    if not isinstance(intermediate, int):  # each layer has its own
        intermediate = max(intermediate)
    of_hidden, of_intermediate = 4 * parameter + 4 * compute + 3 * saved_input, 3 * compute + saved_input
    layer: int = tokens * (of_hidden * hidden + of_intermediate * intermediate)
    layers: int = config.num_hidden_layers
    if arm.train.gradient_checkpointing:
        return layer + tokens * hidden * parameter * layers
    return layer * layers


def _logits(num: int, compute: int) -> int:
    """In the compute dtype, and twice in float32; where they are many, with their gradient and a chunk in float32."""
    return num * (compute + 8) if num <= CHUNKED_FROM else 2 * num * compute + 12 * CHUNK


def phases(arm: Arm) -> tuple[str, ...]:
    """What an arm takes memory for."""
    if not arm.trains:
        return ("calibration", "scoring")
    return ("bf16 training", *(("qat training",) if arm.qat is not None else ()), "scoring")


def disk_bytes(arms: Mapping[str, Arm], num_parameters: int, quantized_weights: Mapping[str, int]) -> dict[str, int]:
    """Disk by phase: the checkpoints that trunk and arms keep while training, and the model folders they end in."""
    first = next(iter(arms.values()))
    trained = [arm for arm in arms.values() if arm.trains]
    checkpoint = num_parameters * BYTES[first.model.param_dtype] * (1 + ADAMW_MOMENTS)
    kept = checkpoint * first.train.keep_last * (len(trained) + (1 if trained and first.warmup.steps else 0))
    plain = sum(num_parameters * BYTES[arm.model.compute_dtype] for arm in arms.values())
    codes = sum(
        num_parameters * BYTES[arms[name].model.compute_dtype] - count * (BYTES[arms[name].model.compute_dtype] - 1)
        for name, count in quantized_weights.items()
    )
    return {"training": kept, "results": plain + codes}
