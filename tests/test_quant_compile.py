"""A whole model under torch.compile: one graph, and it trains as it does without."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from builders import tiny_gpt2, tiny_llama, token_ids
from quantized_steps import SETTINGS, assert_equal, attached, trained
from torch import Tensor

from qatrun.quant import FakeQuantLinear, Mode, ScaleState, freeze, operators

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True"),
]


def one_block(**settings: Any) -> Any:
    """Attention in plain operators: transformers calls another variant of the fused one where it is compiled."""
    return tiny_llama(num_hidden_layers=1, attn_implementation="eager", **settings)


def trained_compiled(model: Any, state: ScaleState, backend: str = "eager") -> dict[str, Tensor]:
    """As `trained`, in one graph or not at all."""
    torch._dynamo.reset()
    compiled = trained(torch.compile(model, backend=backend, fullgraph=True), state)
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in compiled.items()}


@pytest.mark.parametrize("qat", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_compiled_model_trains_the_same(qat: dict[str, Any]) -> None:
    assert_equal(trained(*attached(one_block, **qat)), trained_compiled(*attached(one_block, **qat)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_so_it_does_with_codes_saved_and_gradients_quantized(backend: str) -> None:
    """aot_eager: forward and backward traced as one and cut apart again, as for Inductor."""
    qat: dict[str, Any] = {"saved_activations": "codes", "grad_output": {}}
    assert_equal(trained(*attached(one_block, **qat)), trained_compiled(*attached(one_block, **qat), backend))


def test_so_does_a_conv1d() -> None:
    """Its weight reaches the operator transposed, as a view."""
    model, state = attached(tiny_gpt2)
    model.loss_type = "ForCausalLM"  # else transformers warns of it, which breaks a graph
    assert_equal(trained(*attached(tiny_gpt2)), trained_compiled(model, state))


def test_so_it_does_from_warmup_to_quantized() -> None:
    """The switch recompiles; amaxes of inputs, weights and gradients are the same before it."""

    def watched(compiled: bool) -> dict[str, Tensor]:
        model, state = attached(one_block, grad_output={})
        state.mode, state.primed = Mode.OBSERVE, False
        run = trained_compiled if compiled else trained
        before = run(model, state)
        state.begin_quantizing()
        after = {f"{name} after": tensor for name, tensor in run(model, state).items()}
        return {name: tensor.clone() for name, tensor in (before | after).items()}

    assert_equal(watched(compiled=False), watched(compiled=True))


def test_so_it_does_where_activations_are_recomputed() -> None:
    expected = trained(*attached(one_block))
    model, state = attached(one_block)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal(expected, trained_compiled(model, state))


def test_copies_share_nothing() -> None:
    model, state = attached(one_block)
    other = copy.deepcopy(model)
    expected = trained(*attached(one_block))
    assert_equal(expected, trained_compiled(other, other.quant_state))
    assert not state.history.any()
    assert_equal(expected, trained_compiled(model, state))


def test_inductor_computes_the_same_and_quantizes_a_shared_input_once(passes_made: Counter[tuple[int, ...]]) -> None:
    """Its kernels round norms and softmax otherwise in the last place, so gradients agree but for that."""
    tokens = token_ids()
    model, state = attached(one_block, saved_activations="codes")
    model(input_ids=tokens, labels=tokens).loss.backward()
    compiled, compiled_state = attached(one_block, saved_activations="codes")
    passes_made.clear()
    torch._dynamo.reset()
    torch.compile(compiled, fullgraph=True)(input_ids=tokens, labels=tokens).loss.backward()
    assert passes_made == {
        (32, 32): 2,  # q, o
        (16, 32): 2,  # k, v
        (64, 32): 2,  # gate, up
        (32, 64): 1,  # down
        (2, 16, 32): 3,  # what q/k/v, o, gate/up read
        (2, 16, 64): 1,
    }
    torch.testing.assert_close(compiled_state.amax, state.amax, rtol=1e-6, atol=0)
    for (name, one), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert float((one.grad - other.grad).norm() / one.grad.norm()) < 1e-3, name


def test_a_frozen_model_scores_the_same() -> None:
    model, state = attached(one_block)
    trained(model, state)
    freeze(model, torch.float32)
    with torch.no_grad():
        expected = model(input_ids=token_ids()).logits
        assert torch.equal(torch.compile(model, backend="eager")(input_ids=token_ids()).logits, expected)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("qat", SETTINGS.values(), ids=SETTINGS.keys())
def test_operators_keep_the_promises_that_torch_checks(qat: dict[str, Any], codes: bool) -> None:
    """Shapes, dtypes and strides as announced to the compiler; no result shares memory with an argument."""
    model, _ = attached(one_block, **qat)
    linear: FakeQuantLinear = model.model.layers[0].mlp.down_proj
    x, weight = torch.randn(2, 3, 64, requires_grad=True), linear.effective_weight()
    to_grid = (x.detach(), linear.quantizers["input"].number, torch.float32, codes, True)
    torch.library.opcheck(operators.to_grid, to_grid)
    values, kept, scale, blocked = operators.to_grid(*to_grid)
    saved = kept if codes else values
    torch.library.opcheck(operators.linear, (x, weight, None, values, saved, scale, blocked, linear.number))
    backward = (torch.randn(2, 3, 32), weight.detach(), saved, scale, blocked, linear.number)
    for dtypes in ((torch.float32, torch.bfloat16, torch.float32), (None, torch.float32, None)):
        torch.library.opcheck(operators.linear_gradients, (*backward, *dtypes))
    torch.library.opcheck(operators.observe, (torch.randn(2, 3, 32, requires_grad=True), x, weight, linear.number))
    torch.library.opcheck(operators.observe_gradient, (torch.randn(3, 32), linear.number))
