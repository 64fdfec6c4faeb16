"""What a run will need, estimated from shapes alone: tokens, memory, disk. Estimates, and called so wherever shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qatrun.recipe import Arm
from qatrun.train.chunks import CHUNK, CHUNKED_FROM

BYTES = {"float32": 4, "bfloat16": 2}
ADAMW_MOMENTS = 2


def memory_bytes(
    arm: Arm, num_parameters: int, quantized_weights: int, config: Any, processes: int = 1
) -> dict[str, int]:
    """Peak memory by phase, of each process.

    Parameters, gradients and AdamW's moments are exact. Activations take 34 bytes a token, layer and hidden unit in 16
    bits without the attention matrix (Korthikanti et al., arXiv:2205.05198, section 4.1; SDPA keeps no matrix), 2 with
    gradient checkpointing and one layer in full; logits are held in the compute dtype and twice in float32, but where they
    are many only a chunk of them. Of several processes each holds its part of the states, the embeddings and two blocks,
    which are gathered, and their gradients; to be scored a model lies on each of them whole.
    """
    parameter, compute = BYTES[arm.model.param_dtype], BYTES[arm.model.compute_dtype]
    states = num_parameters * parameter * (2 + ADAMW_MOMENTS)
    casts = num_parameters * compute if compute != parameter else 0
    grids = quantized_weights * (compute + 1)
    if processes > 1:
        embeddings = (
            config.vocab_size * config.hidden_size * (1 if getattr(config, "tie_word_embeddings", False) else 2)
        )
        gathered = embeddings + 2 * max(0, num_parameters - embeddings) // config.num_hidden_layers
        states = states // processes + 2 * gathered * parameter
        casts, grids = (min(num_parameters, gathered) * each for each in (compute, compute + 1))
    tokens = arm.train.micro_batch_size * arm.data.seq_len
    layer = 34 * tokens * config.hidden_size * compute // 2
    layers = config.num_hidden_layers
    kept = 2 * tokens * config.hidden_size * layers + layer if arm.train.gradient_checkpointing else layer * layers
    num_logits = tokens * config.vocab_size
    logits = num_logits * (compute + 8)
    if num_logits > CHUNKED_FROM:
        logits = 2 * num_logits * compute + 12 * CHUNK
    bf16 = states + casts + kept + logits
    # Quantized weights and inputs are kept on their grid for the backward, with one byte a value for the STE's mask.
    qat = bf16 + grids + kept // 4
    scoring = num_parameters * compute
    calibration = num_parameters * parameter + casts + layer + logits  # one layer and the logits, without gradients
    return {"bf16 training": bf16, "qat training": qat, "calibration": calibration, "scoring": scoring}


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
