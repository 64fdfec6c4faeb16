"""Attach, detach and freeze: what they change in a model, and what they must leave alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import logits, quantized_steps, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor

from qatrun import QatConfig
from qatrun.errors import InputError
from qatrun.quant import FakeQuantLinear, Mode, QuantizedLinear, attach, detach, freeze, make_plan, quantized_linears
from qatrun.recipe import RoleConfig, RoleScaling, ScalingConfig
from qatrun.scheme import Slot

INT8 = QatConfig(format="int8", grad_output=RoleConfig(format="fp8_e5m2"))
PER_CHANNEL_PER_TOKEN = QatConfig(
    format="fp8_e4m3", weight=RoleConfig(granularity="per_channel"), input=RoleConfig(granularity="per_token")
)
MODELS = [tiny_llama, tiny_gpt2]


def gradients(model: Any) -> dict[str, Tensor]:
    tokens = token_ids()
    model.zero_grad(set_to_none=True)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("build", MODELS)
def test_attaching_changes_neither_keys_nor_numbers(build: Callable[[], Any]) -> None:
    plain, model = build(), build()
    parameters = dict(model.named_parameters())
    state = attach(model, make_plan(model, INT8))
    assert any(isinstance(module, FakeQuantLinear) for module in model.modules())
    assert_equal_tensors(model.state_dict(), plain.state_dict())
    assert list(model.named_parameters()) == list(parameters.items())
    for mode in (Mode.OFF, Mode.OBSERVE):
        state.enter(mode)
        assert torch.equal(logits(model), logits(plain))
        assert_equal_tensors(gradients(model), gradients(plain))


@pytest.mark.parametrize("build", MODELS)
def test_detaching_gives_back_the_very_modules_with_what_training_made_of_them(build: Callable[[], Any]) -> None:
    model = build()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    state = attach(model, make_plan(model, INT8))
    quantized_steps(model, state)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    detach(model)
    assert dict(model.named_modules()) == modules
    assert dict(model.named_parameters()) == parameters
    assert all(module.training for module in model.modules())
    assert_equal_tensors(model.state_dict(), trained)
    assert not hasattr(model, "quant_state")
    expected = build()
    assert not torch.equal(logits(model), logits(expected))
    expected.load_state_dict(trained)
    assert torch.equal(logits(model), logits(expected))


def test_quantizers_can_be_attached_again_after_detaching_but_not_before() -> None:
    model = tiny_llama()
    plan = make_plan(model, INT8)
    attach(model, plan)
    with pytest.raises(InputError, match="already"):
        attach(model, plan)
    detach(model)
    attach(model, plan)


def test_a_checkpoint_of_the_plain_model_loads_into_the_attached_one() -> None:
    model, other = tiny_llama(), tiny_llama(initializer_range=0.5)
    attach(model, make_plan(model, INT8))
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(logits(model), logits(other))


def test_a_deep_copy_shares_nothing() -> None:
    model = tiny_llama()
    state = attach(model, make_plan(model, INT8))
    quantized_steps(model, state)
    before, scales = logits(model), state.scales.scale.clone()
    twin = copy.deepcopy(model)
    theirs = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert not theirs & {p.data_ptr() for p in [*twin.parameters(), *twin.buffers()]}
    quantized_steps(twin, twin.quant_state)
    assert not torch.equal(twin.quant_state.scales.scale, scales)
    assert torch.equal(state.scales.scale, scales)
    assert torch.equal(logits(model), before)
    twin.quant_state.enter(Mode.OFF)  # the copy's linears read the copy's state, and its own weights
    plain = tiny_llama()
    plain.load_state_dict(twin.state_dict())
    assert torch.equal(logits(twin), logits(plain))


def test_linears_that_read_the_same_tensor_share_one_input_quantizer() -> None:
    model = tiny_llama()
    plan = make_plan(model, QatConfig(ignore=("model.layers.0.self_attn.q_proj",)))
    block = {name.removeprefix("model.layers.0."): group for name, group in plan.input_group.items() if ".0." in name}
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert block == {
        "self_attn.k_proj": attention + "q_proj",  # the first reader names the group, quantized or not
        "self_attn.v_proj": attention + "q_proj",
        "self_attn.o_proj": attention + "o_proj",
        "mlp.gate_proj": mlp + "gate_proj",
        "mlp.up_proj": mlp + "gate_proj",
        "mlp.down_proj": mlp + "down_proj",
    }
    attach(model, plan)
    gate, up = (model.get_submodule(mlp + name) for name in ("gate_proj", "up_proj"))
    assert gate.quant.of["input"] is up.quant.of["input"]
    assert gate.quant.of["weight"].slot != up.quant.of["weight"].slot


@pytest.mark.parametrize("build", MODELS)
def test_shared_input_quantizers_see_what_each_linear_reads(build: Callable[[], Any]) -> None:
    """Hooks record the true amax of every linear's input, weight and output gradient."""
    model = build().train()
    plan = make_plan(model, INT8)
    expected: dict[str, float] = {}

    def record(slot: str, tensor: Tensor) -> None:
        expected[slot] = max(expected.get(slot, 0.0), float(tensor.detach().abs().max()))

    state = attach(model, plan)
    state.enter(Mode.QUANTIZE)
    for name in plan.linears:
        module = model.get_submodule(name)
        record(f"{name}:weight", module.weight)
        module.register_forward_pre_hook(lambda _, args, name=name: record(str(plan.slot(name, "input")), args[0]))
        module.register_full_backward_hook(lambda _, __, grads, name=name: record(f"{name}:grad_output", grads[0]))
    tokens = token_ids()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert dict(zip(state.scales.names, state.scales.amax.tolist(), strict=True)) == expected


def test_casting_the_model_keeps_scales_in_float32() -> None:
    model = tiny_llama()
    state = attach(model, make_plan(model, INT8))
    quantized_steps(model, state)
    scales = state.scales.scale.clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.quant_state.scales.scale.dtype == torch.float32
    assert torch.equal(model.quant_state.scales.scale, scales)
    assert logits(model).dtype == torch.bfloat16


def test_planning_and_attaching_draw_no_random_numbers() -> None:
    model = tiny_llama()
    before = torch.get_rng_state()
    attach(model, make_plan(model, INT8))
    assert torch.equal(torch.get_rng_state(), before)


FROZEN = {
    "hif8": QatConfig(format="hif8"),
    "target": QatConfig(format="hif8", clip="target"),
    "e4m3": PER_CHANNEL_PER_TOKEN,
    "e5m2": QatConfig(format="fp8_e5m2", weight=RoleConfig(granularity="per_channel")),
    "int8": QatConfig(format="int8", input=RoleConfig(granularity="per_token")),
    "static": QatConfig(format="int8", scaling=ScalingConfig(type="static")),
    "none": QatConfig(format="hif8", scaling=ScalingConfig(type="none")),
    "mixed": QatConfig(format="hif8", weight=RoleConfig(format="int8", scaling=RoleScaling(type="dynamic"))),
}


@pytest.mark.parametrize("build", [*MODELS, lambda: tiny_llama(attention_bias=True, tie_word_embeddings=False)])
@pytest.mark.parametrize("qat", FROZEN.values(), ids=FROZEN)
def test_the_frozen_model_computes_what_the_attached_one_did(build: Callable[[], Any], qat: QatConfig) -> None:
    model = build()
    state = attach(model, make_plan(model, qat))
    quantized_steps(model, state)
    attached = logits(model)
    state.enter(Mode.OFF)
    assert not torch.equal(logits(model), attached)
    freeze(model, torch.float32)
    assert torch.equal(logits(model), attached)
    assert {name for name, _ in quantized_linears(model).items()} == set(make_plan(build(), qat).linears)


def test_freezing_calibrates_dynamic_input_scales_from_the_window() -> None:
    window = 3
    model = tiny_llama().train()
    scaling = ScalingConfig(type="dynamic", window=window)
    state = attach(model, make_plan(model, QatConfig(format="int8", scaling=scaling)))
    state.enter(Mode.QUANTIZE)
    slot = state.scales.index[Slot("model.layers.0.mlp.down_proj", "input")]
    seen = []
    for step in range(5):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(0.5)
        model(input_ids=token_ids(seed=step))
        seen.append(float(state.scales.amax[slot]))
        state.push()
    assert seen == sorted(seen, reverse=True)
    freeze(model, torch.float32)
    frozen = model.model.layers[0].mlp.down_proj
    assert isinstance(frozen, QuantizedLinear)
    assert float(frozen.input_scale) == pytest.approx(max(seen[-window:]) / 127, rel=1e-6)


def test_freezing_without_quantizers_or_scales_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(InputError, match="attached"):
        freeze(model, torch.bfloat16)
    state = attach(model, make_plan(model, INT8))
    state.enter(Mode.QUANTIZE)
    with pytest.raises(InputError, match="scales"):
        freeze(model, torch.bfloat16)


@pytest.mark.parametrize(
    ("granularity", "scaling"), [("per_tensor", "delayed"), ("per_tensor", "dynamic"), ("per_token", "dynamic")]
)
def test_frozen_scores_do_not_depend_on_the_rest_of_the_batch(granularity: str, scaling: str) -> None:
    role = RoleConfig(granularity=granularity, scaling=RoleScaling(type=scaling))
    model = tiny_llama()
    # One token's embedding dwarfs the others: whoever shares a scale with it notices.
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 0] *= 1000
        for block in model.model.layers:
            block.post_attention_layernorm.weight.fill_(3)
    state = attach(model, make_plan(model, QatConfig(format="int8", input=role)))
    quantized_steps(model, state, learning_rate=0.0)
    quiet, loud = token_ids(batch_size=4), token_ids(batch_size=4)
    quiet[quiet == 7] = 8
    loud[1:] = 7
    loud[0] = quiet[0]
    if granularity == "per_tensor" and scaling == "dynamic":  # the control: while training it does depend
        with torch.no_grad():
            assert not torch.equal(model(input_ids=quiet).logits[0], model(input_ids=loud).logits[0])
    freeze(model, torch.bfloat16)
    assert torch.equal(logits(model, quiet)[0], logits(model, loud)[0])


def test_hooks_stay_and_a_pickled_model_computes_the_same() -> None:
    model = tiny_gpt2()
    seen: list[str] = []
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *_: seen.append("called"))
    state = attach(model, make_plan(model, INT8))
    quantized_steps(model, state, num_steps=1)
    assert seen
    model.transformer.h[0].attn.c_attn._forward_hooks.clear()  # a lambda cannot be pickled
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model))
    assert again.transformer.h[0].attn.c_attn.quant.state is again.quant_state
