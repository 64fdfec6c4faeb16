"""What makes quantized training fast changes none of its results: kernels, caches, saved codes."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from builders import tiny_gpt2, tiny_llama, token_ids
from quantized_training import SETTINGS, assert_equal, attached, trained
from torch import Tensor, nn

from qatrun.numerics import native
from qatrun.quant import FakeQuantLinear, freeze
from qatrun.scheme import Slot

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C++ compiler."""
    monkeypatch.setattr(native, "kernels", lambda: None)


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("qat", SETTINGS.values(), ids=SETTINGS.keys())
def test_training_is_the_same_on_kernels_and_reference(
    qat: dict[str, Any], make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = trained(*attached(make_model, **qat))
    monkeypatch.setattr(native, "kernels", lambda: None)
    assert_equal(fast, trained(*attached(make_model, **qat)))


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("qat", SETTINGS.values(), ids=SETTINGS.keys())
def test_training_is_the_same_with_codes_saved(qat: dict[str, Any], make_model: Any) -> None:
    values = trained(*attached(make_model, **qat))
    assert_equal(values, trained(*attached(make_model, saved_activations="codes", **qat)))


@pytest.mark.usefixtures("reference_only")
def test_training_is_the_same_with_codes_saved_where_no_kernels_are() -> None:
    assert_equal(trained(*attached()), trained(*attached(saved_activations="codes")))


@pytest.mark.parametrize("saved_activations", ["values", "codes"])
def test_recomputing_activations_changes_nothing(saved_activations: str) -> None:
    expected = trained(*attached())
    model, state = attached(saved_activations=saved_activations)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal(expected, trained(model, state))


def test_saturated_values_of_a_conv1d_get_no_gradient() -> None:
    """Its weight is stored the other way round than it is quantized."""
    model, state = attached(tiny_gpt2, clip="target", format="int8")
    tokens = token_ids()
    model(input_ids=tokens)
    state.push()
    scales = state.scales
    scales.scale, scales.inv_scale = scales.scale / 2, scales.inv_scale * 2  # the upper half of each range saturates
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLinear):
            edge = 127.5 * state.scales.scale[state.scales.index[Slot(name, "weight")]]
            saturated = module.weight.abs() >= edge
            assert saturated.any()
            assert torch.equal(module.weight.grad == 0, saturated)


@pytest.mark.parametrize("saved_activations", ["values", "codes"])
def test_a_weight_is_quantized_once_a_step_and_a_shared_input_once(
    saved_activations: str, passes_made: Counter[tuple[int, ...]]
) -> None:
    """q [32, 32], k and v [16, 32], o [32, 32]; gate and up [64, 32], down [32, 64]; 2 blocks."""
    model, state = attached(saved_activations=saved_activations)
    state.push()  # the first push gives weights their scales, and so a second rounding
    for step in range(2):
        passes_made.clear()
        for micro in range(4):
            tokens = token_ids(seed=10 * step + micro)
            model(input_ids=tokens, labels=tokens).loss.backward()
        assert passes_made == {
            (32, 32): 4,
            (16, 32): 4,
            (64, 32): 4,
            (32, 64): 2,
            (2, 16, 32): 4 * 2 * 3,  # q/k/v, o, gate/up
            (2, 16, 64): 4 * 2,
        }
        state.push()


def test_a_weight_is_let_go_in_the_last_backward_of_a_step(passes_made: Counter[tuple[int, ...]]) -> None:
    expected = trained(*attached())
    model, state = attached()
    tokens = token_ids()
    for last, made_by_the_next in ((False, 0), (True, 14)):
        state.last_micro_batch = last
        model(input_ids=tokens, labels=tokens).loss.backward()
        passes_made.clear()
        model(input_ids=tokens)
        assert sum(count for shape, count in passes_made.items() if len(shape) == 2) == made_by_the_next
    model, state = attached()
    state.last_micro_batch = True  # of every one: made twice is made alike
    assert_equal(expected, trained(model, state))


def test_a_frozen_model_rounds_a_shared_input_once(passes_made: Counter[tuple[int, ...]]) -> None:
    model, state = attached()
    trained(model, state)
    freeze(model, torch.float32)
    passes_made.clear()
    with torch.no_grad():
        model(input_ids=token_ids())
    assert passes_made == {(2, 16, 32): 6, (2, 16, 64): 2}


def test_a_changed_weight_is_noticed() -> None:
    model, _ = attached()
    model.eval()
    other = {name: 1.5 * p.detach().clone() for name, p in model.named_parameters()}
    fresh, _ = attached()
    fresh.load_state_dict(other, strict=False)
    fresh.eval()
    with torch.no_grad():
        expected = fresh(input_ids=token_ids()).logits
        assert not torch.equal(model(input_ids=token_ids()).logits, expected)
        model.load_state_dict(other, strict=False)
        assert torch.equal(model(input_ids=token_ids()).logits, expected)
        for p in model.parameters():
            p.data = p.data / 1.5
        assert not torch.equal(model(input_ids=token_ids()).logits, expected)


def test_an_input_changed_in_place_is_noticed() -> None:
    model, _ = attached()
    linear = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    with torch.no_grad():
        before = linear(x)
        x.mul_(2)
        assert torch.equal(linear(x), linear(x.clone()))
        assert not torch.equal(linear(x), before)
    with torch.inference_mode():
        x = torch.randn(3, 32)
        before = linear(x)
        x.mul_(2)
        assert not torch.equal(linear(x), before)


def test_copies_compute_the_same_and_share_nothing() -> None:
    model, state = attached()
    tokens = token_ids()
    model(input_ids=tokens, labels=tokens).loss.backward()
    state.push()
    model.zero_grad(set_to_none=True)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = trained(model, state)
    for other in copies:
        assert_equal(expected, trained(other, other.quant_state))


@pytest.mark.parametrize("saved_activations", ["values", "codes"])
def test_no_activation_outlives_its_step(saved_activations: str) -> None:
    model, _ = attached(saved_activations=saved_activations)
    tokens = torch.randint(101, (3, 16))  # 3: a size that no parameter has
    model(input_ids=tokens, labels=tokens).loss.backward()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]  # isinstance() would wake dead weak proxies
    assert [tuple(t.shape) for t in tensors if t.shape[:2] == (3, 16)] == [(3, 16)]


def test_nothing_is_held_while_activations_are_recomputed() -> None:
    """A forward under checkpointing keeps one tensor a block, not one an input of a linear."""
    model, _ = attached()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(101, (3, 16))
    loss = model(input_ids=tokens, labels=tokens).loss
    held = [
        module.quant.of["input"].latest._result for module in model.modules() if isinstance(module, FakeQuantLinear)
    ]
    assert held == [None] * len(held)
    loss.backward()


@pytest.mark.parametrize(("saved_activations", "most"), [("values", 1.05), ("codes", 0.92)])
def test_bytes_saved_for_the_backward(saved_activations: str, most: float) -> None:
    """Against the same model unquantized, in bf16 autocast."""

    def saved_bytes(model: nn.Module) -> int:
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            tokens = torch.randint(101, (4, 64))
            model(input_ids=tokens, labels=tokens)
        return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)

    sizes = {"hidden_size": 128, "intermediate_size": 384}
    plain = saved_bytes(tiny_llama(**sizes).train())
    model, _ = attached(lambda: tiny_llama(**sizes), saved_activations=saved_activations)
    assert saved_bytes(model) / plain <= most
