"""Scales without training: which channels can be scaled where they are made, smoothing, and the scale that loses least."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import logits, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, MixtralConfig, MixtralForCausalLM

from qatrun import QatConfig
from qatrun.quant import attach, calibrate, calibrated_plan, find_folds, make_plan, smooth
from qatrun.quant.smoothing import channel_ranges
from qatrun.recipe import RoleConfig, ScalingConfig
from qatrun.scheme import Slot

BATCHES = [token_ids(4, seed=seed) for seed in range(3)]
OUTLIER = 5  # the channel of inputs that is made 64 times as large as the others

LLAMA = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


def folds_of_block(model: nn.Module, prefix: str) -> dict[str, tuple[str, ...]]:
    return {
        fold.producer.removeprefix(prefix): tuple(name.removeprefix(prefix) for name in fold.readers)
        for fold in find_folds(model)
        if fold.producer.startswith(prefix)
    }


def with_outlier() -> Any:
    """The tiny Llama, computing what it did, with a channel of every norm's output that dwarfs the others."""
    model = tiny_llama()
    with torch.no_grad():
        for fold in find_folds(model):
            if "layernorm" in fold.producer:
                model.get_submodule(fold.producer).weight[OUTLIER] *= 64
                for name in fold.readers:
                    model.get_submodule(name).weight[:, OUTLIER] /= 64
    return model


def test_norms_and_up_projections_make_inputs_that_can_be_scaled() -> None:
    assert folds_of_block(tiny_llama(), "model.layers.1.") == LLAMA
    of_gpt2 = {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}  # nothing that an activation makes
    assert folds_of_block(tiny_gpt2(), "transformer.h.0.") == of_gpt2


def test_a_head_is_left_alone() -> None:
    """Tied, its columns are the embeddings'; untied, it reads a slice of what the norm makes."""
    for tied in (True, False):
        model = tiny_llama(tie_word_embeddings=tied)
        assert {fold.producer.rpartition(".")[2] for fold in find_folds(model)} == {
            *("input_layernorm", "post_attention_layernorm", "up_proj")
        }


@pytest.mark.parametrize(
    ("kind", "config", "left"),
    [
        # A router and experts read what the second norm makes; Gemma scales by 1 + weight.
        (MixtralForCausalLM, MixtralConfig, {"input_layernorm": LLAMA["input_layernorm"]}),
        (GemmaForCausalLM, GemmaConfig, {"mlp.up_proj": LLAMA["mlp.up_proj"]}),
    ],
)
def test_what_somebody_else_reads_or_another_formula_makes_is_left_alone(kind: Any, config: Any, left: Any) -> None:
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    model = kind(config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=0))
    assert folds_of_block(model, "model.layers.0.") == left


@pytest.mark.parametrize("make", [with_outlier, tiny_gpt2, lambda: tiny_llama(attention_bias=True, mlp_bias=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_smoothed_model_computes_the_same_bit_for_bit(make: Any, dtype: torch.dtype) -> None:
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    model.to(dtype)
    smoothed = copy.deepcopy(model)
    smooth(smoothed, find_folds(smoothed), BATCHES, 0.5)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, smoothed.get_parameter(name))]
    assert len(changed) >= 2 * len(find_folds(model))
    assert torch.equal(logits(smoothed, BATCHES[0]), logits(model, BATCHES[0]))


def test_autocast_sees_the_smoothed_weights_at_once() -> None:
    """It keeps the bfloat16 weights of its first forward."""
    model = with_outlier()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits(model, BATCHES[0])
        smooth(model, find_folds(model), BATCHES, 0.5)
        assert torch.equal(logits(model, BATCHES[0]), before)


def test_smoothing_evens_inputs_out_by_its_share() -> None:
    reader = "model.layers.0.self_attn.q_proj"

    def unevenness(share: float | None) -> float:
        model = with_outlier()
        if share is not None:
            smooth(model, find_folds(model), BATCHES, share)
        ranges = channel_ranges(model, [reader], BATCHES)[reader]
        return float(ranges.max() / ranges.median())

    assert unevenness(None) > 40
    assert unevenness(1.0) <= 2  # but for the rounding to a power of two
    assert unevenness(None) > 4 * unevenness(0.5) > unevenness(1.0)


def quantized(model: Any, qat: QatConfig, *, least_error: bool = False) -> Any:
    state = attach(model, calibrated_plan(make_plan(model, qat)))
    calibrate(model, BATCHES, least_error=least_error)
    return state


def test_the_least_error_is_that_of_the_best_scale_tried_one_by_one() -> None:
    """On a grid of -7..7, where to clip is worth it."""
    model, seen = tiny_llama(), list[Tensor]()
    name, qat = (
        "model.layers.0.mlp.down_proj",
        QatConfig(format="int8", clip="target", input=RoleConfig(target_amax=7.0)),
    )
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in BATCHES:
        logits(model, batch)
    handle.remove()
    x = torch.cat(seen)
    scales = {0.9**n: float(x.abs().max()) / 7 * 0.9**n for n in range(24)}
    errors = {
        factor: float(((x / scale).round().clamp(-7, 7) * scale - x).square().sum()) for factor, scale in scales.items()
    }
    best = min(errors, key=lambda factor: errors[factor])
    assert best < 0.9
    state = quantized(model, qat, least_error=True)
    slot = state.scales.index[Slot(name, "input")]
    assert float(state.scales.scale[slot]) == pytest.approx(scales[best], rel=1e-5)
    assert float(state.scales.scale[slot] * state.scales.inv_scale[slot]) == pytest.approx(1.0)
    # The history says the same, for who goes on from it.
    state.scales.move(state.scales.delayed)
    assert float(state.scales.scale[slot]) == pytest.approx(scales[best], rel=1e-5)


def test_a_range_with_a_zero_point_shrinks_towards_it() -> None:
    qat = QatConfig(format="int8", input=RoleConfig(symmetric=False))
    absmax, mse = (quantized(with_outlier(), qat, least_error=least_error) for least_error in (False, True))
    assert torch.equal(absmax.scales.zero, mse.scales.zero)
    assert (mse.scales.scale <= absmax.scales.scale).all()
    mse.scales.move(mse.scales.delayed)
    assert torch.allclose(absmax.scales.zero, mse.scales.zero, atol=1.0)


def test_powers_of_two_stay_powers_of_two() -> None:
    state = quantized(
        with_outlier(), QatConfig(format="int8", scaling=ScalingConfig(rounding="power_of_two")), least_error=True
    )
    assert torch.equal(state.scales.scale.log2(), state.scales.scale.log2().round())


def test_a_calibrated_plan_is_of_the_forward_and_keeps_a_scale_of_one_where_asked() -> None:
    qat = QatConfig(scaling=ScalingConfig(type="none"), grad_output=RoleConfig())
    plan = make_plan(tiny_llama(), qat)
    kinds = {
        keeps: {
            (slot.role, scheme.scaling.type)
            for slot, scheme in calibrated_plan(plan, keeps_unscaled=keeps).slots().items()
        }
        for keeps in (False, True)
    }
    assert kinds == {
        keeps: {(role, kind) for role in ("input", "weight")} for keeps, kind in ((False, "delayed"), (True, "none"))
    }
