"""The models that are compared: one architecture with random weights, with and without quantizers.

Quantized arms are W8A8 on every linear but lm_head. qatrun's take per-tensor scales, delayed; torchao's are what it
offers nearest to that: FP8 per tensor, INT8 per token and per channel (it has no per-tensor INT8), scales dynamic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qatrun.data import Batch
from qatrun.numerics import bfloat16_products
from qatrun.quant import Mode, QuantPlan, QuantState, attach, make_plan
from qatrun.recipe import ModelConfig, QatConfig, TrainConfig
from qatrun.train.stepper import Stepper

UNQUANTIZED = "unquantized"
LEARNING_RATE = 1e-5
NO_TORCHAO = "torchao is not installed (pip install 'qatrun[bench]')"


@dataclass(frozen=True)
class Shape:
    """A Llama and the batch it is measured with."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    seq_len: int
    tied: bool = False
    attention_bias: bool = False


SHAPES = {
    "llama-35m": Shape(512, 1536, 8, 8, 8, 8192, batch=8, seq_len=256),
    "openpangu-1b": Shape(1536, 6144, 26, 12, 6, 153376, batch=4, seq_len=2048, tied=True, attention_bias=True),
    "tiny": Shape(64, 192, 2, 2, 2, 256, batch=2, seq_len=32),
}


def qatrun_configs() -> dict[str, QatConfig]:
    """Arm name -> recipe section of each of qatrun's arms."""
    configs = {name: QatConfig(format=name) for name in ("hif8", "fp8_e4m3", "int8")}
    configs["hif8_codes"] = QatConfig(format="hif8", saved_activations="codes")
    return configs


def arm_names() -> list[str]:
    """Every arm that can run here, the reference first."""
    torchao = ["torchao_fp8", "torchao_int8"] if find_spec("torchao") else []
    return [UNQUANTIZED, *qatrun_configs(), *torchao]


def build_model(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Random weights, the same for every arm, in training mode."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=max(2048, shape.seq_len),
        tie_word_embeddings=shape.tied,
        attention_bias=shape.attention_bias,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(dtype).train()


def token_ids(shape: Shape, device: str) -> Tensor:
    """[batch, seq_len] random tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, shape.vocab, (shape.batch, shape.seq_len), generator=generator).to(device)


def plan_of(model: nn.Module, arm: str) -> QuantPlan | None:
    """What qatrun quantizes in an arm; None where it does nothing."""
    config = qatrun_configs().get(arm)
    return None if config is None else make_plan(model, config)


def quantize_model(model: nn.Module, arm: str) -> QuantState | None:
    """Put an arm's quantizers on the model; returns the scale state of qatrun's."""
    if arm.startswith("torchao"):
        _prepare_with_torchao(model, arm)
    plan = plan_of(model, arm)
    if plan is None:
        return None
    state = attach(model, plan)
    state.enter(Mode.QUANTIZE)
    return state


@dataclass(frozen=True)
class Trainee:
    """One arm in training by the loop's own step: master weights in float32, fused AdamW, gradients clipped.

    Attributes:
        plan: what qatrun quantizes, if anything.
        batch: of one step, all its micro-batches.
    """

    plan: QuantPlan | None
    stepper: Stepper
    batch: Batch

    def forward(self) -> Tensor:
        """Mean loss, [] float32, with its graph."""
        with bfloat16_products():
            return self.stepper.loss(self.batch, self.batch.num_targets)

    def step(self) -> Tensor:
        """Forward, backward, optimizer and, where there is one, the scale update; returns the loss."""
        with bfloat16_products():
            return self.stepper.step(self.batch, LEARNING_RATE).loss


def untrained(
    arm: str,
    model: nn.Module,
    shape: Shape,
    device: str,
    *,
    bf16: bool,
    checkpointing: bool = False,
    micro_batches: int = 1,
) -> Trainee:
    """An arm made of a model, before its first step."""
    if arm.startswith("torchao"):
        _prepare_with_torchao(model, arm)
    size = micro_batches * shape.batch
    train = TrainConfig(
        steps=1, global_batch_size=size, micro_batch_size=shape.batch, gradient_checkpointing=checkpointing
    )
    dtypes = ModelConfig(path="random", compute_dtype="bfloat16" if bf16 else "float32")
    plan = plan_of(model, arm)
    stepper = Stepper(Accelerator(cpu=device == "cpu"), model, plan, train, dtypes)
    if stepper.quant is not None:
        stepper.quant.enter(Mode.QUANTIZE)
    ids = token_ids(shape, "cpu").repeat(micro_batches, 1)
    return Trainee(plan, stepper, Batch(ids, ids))


def trainee(
    arm: str,
    shape: Shape,
    device: str,
    *,
    bf16: bool,
    checkpointing: bool = False,
    compiled: bool = False,
    micro_batches: int = 1,
) -> Trainee:
    """An arm past its first two steps: compiled, its scales from a history, its optimizer state allocated.

    Args:
        compiled: the whole model under torch.compile.
    """
    model = build_model(shape, device)
    made = untrained(arm, model, shape, device, bf16=bf16, checkpointing=checkpointing, micro_batches=micro_batches)
    if compiled:
        model.compile(dynamic=False)
    for _ in range(2):
        made.step()
    return made


def resized(shape: Shape, **changes: Any) -> Shape:
    """The shape with other layers, width (heads of 64, FFN of three times the width), batch or sequence length."""
    if "hidden" in changes:
        hidden = changes["hidden"]
        changes = {**changes, "ffn": 3 * hidden, "heads": hidden // 64, "kv_heads": hidden // 64}
    return replace(shape, **changes)


def torchao_fp8_quantizer() -> nn.Module:
    """torchao's fake quantizer for one tensor, E4M3 with one dynamic scale."""
    qat = _torchao_qat()
    quantizer: nn.Module = qat.Float8FakeQuantizer(_torchao_fp8_config(qat))
    return quantizer


def _prepare_with_torchao(model: nn.Module, arm: str) -> None:
    qat = _torchao_qat()
    if arm == "torchao_fp8":
        inputs = weights = _torchao_fp8_config(qat)
    else:
        inputs = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weights = qat.IntxFakeQuantizeConfig(torch.int8, "per_channel")
    import_module("torchao.quantization").quantize_(
        model,
        qat.QATConfig(activation_config=inputs, weight_config=weights, step="prepare"),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
    )


def _torchao_fp8_config(qat: Any) -> Any:
    per_tensor = import_module("torchao.quantization.granularity").PerTensor()
    return qat.Float8FakeQuantizeConfig(torch.float8_e4m3fn, per_tensor)


def _torchao_qat() -> Any:
    return import_module("torchao.quantization.qat")
