"""Which linears of a model can be quantized: those that are called and compute x W^T + b."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import VOCAB_SIZE, quantized_steps, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    HunYuanMoEV1Config,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhimoeConfig,
    PreTrainedModel,
)
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1ForCausalLM
from transformers.models.phimoe.modeling_phimoe import PhimoeForCausalLM

from qatrun import QatConfig
from qatrun.errors import InputError
from qatrun.quant import Mode, attach, coverage, make_plan, survey
from qatrun.quant.linears import NOT_CALLED, READS_WEIGHT

SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS = {"intermediate_size": 32, "num_local_experts": 2, "num_experts": 2}


def on_meta(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return kind(config)


ROWS = {
    "weight read: mamba": (MambaForCausalLM, MambaConfig(**SIZES, state_size=4), "mixer.dt_proj", READS_WEIGHT),
    "weight's dtype read: hunyuan": (
        HunYuanMoEV1ForCausalLM,
        HunYuanMoEV1Config(**SIZES, **HEADS, **EXPERTS, head_dim=16, moe_topk=1),
        "mlp.gate.wg",
        READS_WEIGHT,
    ),
    "own forward: phimoe": (
        PhimoeForCausalLM,
        PhimoeConfig(**SIZES, **HEADS, **EXPERTS),
        "mlp.router",
        "PhimoeTopKRouter computes more than a product",
    ),
}


@pytest.mark.parametrize(("kind", "config", "leaf", "reason"), ROWS.values(), ids=ROWS)
def test_what_only_looks_like_a_linear_is_left_alone_and_named(
    kind: type[PreTrainedModel], config: Any, leaf: str, reason: str
) -> None:
    model = on_meta(kind, config)
    found = {name: why for name, why in survey(model).unfit.items() if name != "lm_head"}
    assert set(found.values()) == {reason}
    assert len(found) == 2
    assert all(name.endswith(leaf) for name in found)
    plan = make_plan(model, QatConfig())
    assert plan.linears
    assert not any(name.endswith(leaf) for name in plan.linears)
    assert f".*.{leaf} ({reason})" in str(coverage(model, plan))
    with pytest.raises(InputError, match=rf"nothing is left .*{leaf} \({reason}\)"):
        make_plan(model, QatConfig(targets=(f"*.{leaf}",)))


def test_a_class_of_its_own_that_computes_a_product_is_a_linear() -> None:
    model = on_meta(FalconForCausalLM, FalconConfig(**SIZES, num_attention_heads=2))
    seen = survey(model)
    assert type(model.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"
    assert not seen.unfit
    assert len(make_plan(model, QatConfig()).linears) == 8


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class Grouped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.unflatten(-1, (2, -1)), self.weight, self.bias).flatten(-2)


@pytest.mark.parametrize(
    ("linear", "fit"),
    [
        (nn.Linear(32, 32), True),
        (Renamed(32, 32), True),
        (Renamed(32, 32, bias=False), True),
        (Scaled(32, 32), False),
        (Grouped(16, 16), False),
        (weight_norm(nn.Linear(32, 32)), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_forward_is_tried_out_not_looked_up(linear: nn.Module, fit: bool) -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn.o_proj = linear
    assert ("model.layers.0.self_attn.o_proj" not in survey(model).unfit) is fit


class WithTower(LlamaForCausalLM):
    """A Llama with a part that text does not reach."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tower = nn.Linear(4, 4)


class ReadsItsWeight(LlamaForCausalLM):
    """Multiplies by a weight that it takes out of its module."""

    looks_at_values = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, **settings: Any) -> Any:
        if self.looks_at_values:
            input_ids.tolist()
        output = super().forward(input_ids, **settings)
        output.logits = output.logits + self.model.embed_tokens(input_ids) @ self.extra.weight.t()
        return output


class ReadsItsWeightAtRunTime(ReadsItsWeight):
    looks_at_values = True


def test_a_part_that_text_does_not_reach_is_left_alone() -> None:
    model = WithTower(tiny_llama().config)
    assert dict(survey(model).unfit) == {"tower": NOT_CALLED}
    assert len(make_plan(model, QatConfig()).linears) == 14


@pytest.mark.parametrize("kind", [ReadsItsWeight, ReadsItsWeightAtRunTime])
def test_a_weight_read_from_outside_is_found_in_a_dry_run_or_else_in_the_source(kind: type[LlamaForCausalLM]) -> None:
    seen = survey(kind(tiny_llama().config))
    assert dict(seen.unfit) == {"extra": READS_WEIGHT}
    runs_on_meta = kind is ReadsItsWeight
    assert (seen.first_reader["model.layers.0.mlp.up_proj"] == "model.layers.0.mlp.gate_proj") is runs_on_meta


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    before = {name: (type(m), len(m._forward_hooks)) for name, m in model.named_modules()}
    survey(model)
    assert {name: (type(m), len(m._forward_hooks)) for name, m in model.named_modules()} == before


def test_a_linear_tied_to_the_embeddings_is_quantized_only_where_it_is_named() -> None:
    model = tiny_gpt2()
    assert survey(model).tied == {"lm_head"}
    assert "lm_head" not in make_plan(model, QatConfig()).linears
    assert "lm_head" in make_plan(model, QatConfig(targets=("*",))).linears


def test_a_model_that_refuses_text_alone_says_so() -> None:
    class Reader(LlamaForCausalLM):
        def forward(self, *_: Any, **settings: Any) -> Any:
            raise ValueError("pixel_values cannot be None")

    with pytest.raises(InputError, match="does not run on text alone: pixel_values cannot be None"):
        make_plan(Reader(tiny_llama().config), QatConfig())


def test_a_model_may_change_an_output_in_place_while_gradients_are_observed() -> None:
    config = FalconConfig(**SIZES, num_attention_heads=2, hidden_dropout=0.0, attention_dropout=0.0)
    model = FalconForCausalLM(config)
    state = attach(model, make_plan(model, QatConfig(format="fp8_e4m3", grad_output={})))
    state.enter(Mode.OBSERVE)
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    state.push()
    seen = [index for slot, index in state.scales.index.items() if slot.role == "grad_output"]
    assert (state.scales.history[0, seen] > 0).all()
    quantized_steps(model, state)
