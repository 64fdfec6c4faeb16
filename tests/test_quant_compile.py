"""A whole model under torch.compile: one graph, and it trains as it does without."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders import tiny_gpt2, tiny_llama, token_ids
from compilers import needs_compiler
from quantized_training import SETTINGS, assert_equal, attached, trained
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor_config

from qatrun.quant import FakeQuantLinear, Mode, QuantState, detach, freeze, operators

pytestmark = [
    pytest.mark.usefixtures("one_thread", "nothing_compiled"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True"),
]


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Neither in this process nor on disk."""
    torch._dynamo.reset()
    with inductor_config.patch(force_disable_caches=True):
        yield


def one_block(**settings: Any) -> Any:
    """Attention in plain operators: transformers calls another variant of the fused one where it is compiled."""
    return tiny_llama(**{"num_hidden_layers": 1, "attn_implementation": "eager"} | settings)


def gpt2() -> Any:
    model = tiny_gpt2()
    model.loss_type = "ForCausalLM"  # else transformers warns of it, which breaks a graph
    return model


def trained_compiled(model: Any, state: QuantState, backend: str = "eager") -> dict[str, Tensor]:
    """As `trained`, in one graph or not at all."""
    compiled = trained(torch.compile(model, backend=backend, fullgraph=True), state)
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in compiled.items()}


@pytest.mark.parametrize("qat", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_compiled_model_trains_the_same(qat: dict[str, Any]) -> None:
    assert_equal(trained(*attached(one_block, **qat)), trained_compiled(*attached(one_block, **qat)))


def test_so_it_does_in_bfloat16() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(trained(*attached(one_block)), trained_compiled(*attached(one_block)))


def test_so_it_does_with_codes_saved_and_gradients_quantized() -> None:
    """aot_eager: forward and backward traced as one and cut apart again, as for Inductor."""
    qat: dict[str, Any] = {"saved_activations": "codes", "grad_output": {}}
    assert_equal(trained(*attached(one_block, **qat)), trained_compiled(*attached(one_block, **qat), "aot_eager"))


def test_so_does_a_conv1d_whose_weights_saturate() -> None:
    """They reach the operator transposed, as a view, and so does the mask of what saturates."""

    def saturating() -> tuple[Any, QuantState]:
        model, state = attached(gpt2, clip="target", format="int8", scaling={"update_interval": 100})
        model(input_ids=token_ids())
        state.push()
        state.scales.scale, state.scales.inv_scale = state.scales.scale / 2, state.scales.inv_scale * 2
        return model, state

    assert_equal(trained(*saturating()), trained_compiled(*saturating()))


def test_so_it_does_from_warmup_to_quantized() -> None:
    """The switch is noticed by what is compiled; amaxes of inputs, weights and gradients are the same before it."""

    def watched(compiled: bool) -> dict[str, Tensor]:
        model, state = attached(one_block, grad_output={})
        state.mode, state.primed = Mode.OBSERVE, False
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        before = {name: tensor.clone() for name, tensor in trained(run, state).items()}
        state.enter(Mode.QUANTIZE)
        after = trained(run, state)
        everything = {f"{name} before": tensor for name, tensor in before.items()} | after
        return {name.removeprefix("_orig_mod."): tensor for name, tensor in everything.items()}

    assert_equal(watched(compiled=False), watched(compiled=True))


def test_so_it_does_where_activations_are_recomputed() -> None:
    expected = trained(*attached(one_block))
    model, state = attached(one_block)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal(expected, trained_compiled(model, state))


def test_copies_share_nothing_but_the_graph() -> None:
    model, state = attached(one_block)
    other = copy.deepcopy(model)
    expected = trained(*attached(one_block))
    assert_equal(expected, trained_compiled(other, other.quant_state))
    assert not state.scales.amax.any()
    assert not state.scales.history.any()
    assert_equal(expected, trained_compiled(model, state))


def test_layers_compiled_one_by_one_share_a_graph() -> None:
    """Else a deep model would run into Dynamo's limit of graphs for one function."""
    model, state = attached(lambda: one_block(num_hidden_layers=3))
    expected = trained(*attached(lambda: one_block(num_hidden_layers=3)))
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    assert_equal(expected, trained(model, state))
    assert counter.frame_count == 1


@needs_compiler
def test_inductor_computes_the_same_and_quantizes_a_shared_input_once(passes_made: Counter[tuple[int, ...]]) -> None:
    """Its kernels round norms and softmax otherwise in the last place, so gradients agree but for that."""

    def second_step(model: Any, state: QuantState, run: Any) -> tuple[dict[str, Tensor], Tensor]:
        for seed in (0, 1):
            passes_made.clear()
            model.zero_grad(set_to_none=True)
            tokens = token_ids(seed=seed)
            run(input_ids=tokens, labels=tokens).loss.backward()
            amax = state.scales.amax.clone()
            state.push()
        return {name: parameter.grad for name, parameter in model.named_parameters()}, amax

    model, state = attached(one_block, saved_activations="codes")
    gradients, amax = second_step(model, state, model)
    model, state = attached(one_block, saved_activations="codes")
    compiled_gradients, compiled_amax = second_step(model, state, torch.compile(model, fullgraph=True))
    assert passes_made == {
        (32, 32): 2,  # q, o
        (16, 32): 2,  # k, v
        (64, 32): 2,  # gate, up
        (32, 64): 1,  # down
        (2, 16, 32): 3,  # what q/k/v, o, gate/up read
        (2, 16, 64): 1,
    }
    torch.testing.assert_close(compiled_amax, amax, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert float((compiled_gradients[name] - gradient).norm() / gradient.norm()) < 1e-3, name


def test_a_stand_in_for_a_weight_is_quantized_in_its_place() -> None:
    """And gets a gradient where the parameter that it stands for would not."""

    def gradient(compiled: bool) -> Tensor:
        model, _ = attached(one_block, clip="target")
        linear = model.model.layers[0].mlp.down_proj.requires_grad_(False)
        stand_in = (1.5 * linear.weight.detach()).requires_grad_()

        def run(x: Tensor, weight: Tensor) -> Tensor:
            return torch.func.functional_call(linear, {"weight": weight}, (x,)).square().sum()

        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        (torch.compile(run, backend="eager", fullgraph=True) if compiled else run)(x, stand_in).backward()
        assert stand_in.grad is not None
        return stand_in.grad

    assert torch.equal(gradient(compiled=False), gradient(compiled=True))


def test_scales_that_moved_before_the_backward_are_refused() -> None:
    model, state = attached(one_block)
    loss = torch.compile(model, backend="eager")(input_ids=token_ids(), labels=token_ids()).loss
    state.push()
    with pytest.raises(RuntimeError, match="call push after the backward"):
        loss.backward()


def test_quantizers_that_are_gone_are_named() -> None:
    model, _ = attached(one_block)
    loss = torch.compile(model, backend="eager")(input_ids=token_ids(), labels=token_ids()).loss
    detach(model)
    with pytest.raises(RuntimeError, match="detached, frozen or deleted"):
        loss.backward()


@pytest.mark.parametrize(
    "qat", [{}, {"input": {"granularity": "per_token"}}, SETTINGS["asymmetric"], SETTINGS["asymmetric by token"]]
)
def test_a_frozen_model_scores_the_same(qat: dict[str, Any]) -> None:
    model, state = attached(one_block, **qat)
    trained(model, state)
    freeze(model, torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            expected = model(input_ids=token_ids()).logits
            assert torch.equal(compiled(input_ids=token_ids()).logits, expected)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("qat", SETTINGS.values(), ids=SETTINGS.keys())
def test_operators_keep_the_promises_that_torch_checks(qat: dict[str, Any], codes: bool) -> None:
    """Shapes, dtypes and strides as announced to the compiler; no result shares memory with an argument or a scale."""
    model, state = attached(one_block, **qat)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    state.push()
    linear: FakeQuantLinear = model.model.layers[0].mlp.down_proj
    quantizer, weight = linear.quant.of["input"], linear.effective_weight()
    x = torch.randn(3, 2, 64).transpose(0, 1).requires_grad_()
    scheme, code_dtype = quantizer.scheme, quantizer.grid.code_dtype if codes else None
    masked = scheme.ste == "clipped"
    to_grid = (x.detach(), quantizer.number, torch.float32, code_dtype, scheme.granularity, masked)
    torch.library.opcheck(operators.to_grid, to_grid)
    values, kept, scale, blocked, zero = operators.to_grid(*to_grid)
    assert scale.untyped_storage().data_ptr() != state.scales.scale.untyped_storage().data_ptr()
    on_x = (kept if codes else values, scale, blocked if masked else None, None if scheme.symmetric else zero)
    torch.library.opcheck(operators.linear, (x, weight, None, values, *on_x, linear.number))
    generation = torch.tensor(linear.generation())
    for dtypes in ((torch.float32, torch.bfloat16, torch.float32), (None, torch.float32, None)):
        backward = (torch.randn(2, 3, 32), weight.detach(), *on_x, linear.number, generation, *dtypes)
        torch.library.opcheck(operators.linear_gradients, backward)
    torch.library.opcheck(operators.observe, (torch.randn(2, 3, 32, requires_grad=True), x, weight, linear.number))
    torch.library.opcheck(operators.observe_gradient, (torch.randn(3, 32), linear.number))
