"""Put quantizers on a model, take them off again, and freeze them for scoring.

state = attach(model, plan)     # every planned linear becomes a FakeQuantLinear
state.enter(Mode.QUANTIZE)      # until then it computes as before
...
detach(model)                   # the very linears that were there before
freeze(model, dtype)            # instead: weights on their grid, scales fixed, for scoring and saving
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from qatrun.errors import InputError
from qatrun.layout import QUANT_METHOD
from qatrun.quant.expert_weights import named_experts
from qatrun.quant.experts import FakeQuantExperts, QuantizedExperts
from qatrun.quant.linear import FakeQuantLinear, Quantization
from qatrun.quant.plan import QuantPlan
from qatrun.quant.quantized import QuantizedLinear
from qatrun.quant.quantizer import Quantizer
from qatrun.quant.state import QuantState

STATE_NAME = "quant_state"
T = TypeVar("T", bound=nn.Module)


def attach(model: nn.Module, plan: QuantPlan) -> QuantState:
    """Make the planned linears fake-quantized ones.

    `state_dict` keys, parameters and modules stay as they are. The state is registered on the model as `quant_state`, so
    it follows the model to a device and into a deep copy.

    Returns:
        the state of the model's quantizers, in mode OFF.
    Raises:
        InputError: the model has quantizers already.
    """
    if hasattr(model, STATE_NAME):
        raise InputError("the model has quantizers attached already; detach them first")
    device = next(model.parameters()).device
    state = QuantState(plan).to(
        "cpu" if device.type == "meta" else device
    )  # scales have values where weights have none
    quantizers = {slot: Quantizer(slot, scheme, state) for slot, scheme in plan.slots().items()}
    quants = {
        name: Quantization(state, {role: quantizers[plan.slot(name, role)] for role in schemes}, plan.saves_codes)
        for name, schemes in plan.schemes.items()
    }
    experts = [each for each in named_experts(model).values() if each.linears[0] in quants]
    for owner in dict.fromkeys(each.owner for each in experts):
        of_module = {each: [quants.pop(name) for name in each.linears] for each in experts if each.owner == owner}
        FakeQuantExperts.put_on(model.get_submodule(owner), of_module)
    for name, quant in quants.items():
        FakeQuantLinear.put_on(model.get_submodule(name), quant)
    model.add_module(STATE_NAME, state)
    return state


def detach(model: nn.Module) -> None:
    """Undo `attach`: the original modules, with the parameters as training left them."""
    for linear in _modules_of(model, FakeQuantLinear).values():
        linear.take_off()
    for experts in _modules_of(model, FakeQuantExperts).values():
        experts.take_off()
    if hasattr(model, STATE_NAME):
        delattr(model, STATE_NAME)


def attached_state(model: nn.Module) -> QuantState:
    """The state of a model's quantizers.

    Raises:
        InputError: nothing is attached.
    """
    state = getattr(model, STATE_NAME, None)
    if not isinstance(state, QuantState):
        raise InputError("no quantizers are attached to the model")
    return state


@torch.no_grad()
def freeze(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn an attached model into what is deployed: weights rounded to their grid from the master weights, input
    scales fixed, everything else cast to `dtype`, the compute dtype. Per-token input scales stay dynamic, since they do
    not depend on the batch. The master weights of quantized linears are gone afterwards.

    Raises:
        InputError: nothing is attached, or no input was ever seen to take a scale from.
    """
    state = attached_state(model)
    if not state.primed:
        raise InputError("no scales to freeze yet: calibrate on some batches, or train")
    model.eval()
    state.calibrate_dynamic()
    for name, linear in _modules_of(model, FakeQuantLinear).items():
        replace_linears(model, {name: QuantizedLinear.from_trained(linear, dtype)})
    for module in _modules_of(model, FakeQuantExperts).values():
        trained = {linear.name: QuantizedLinear.from_trained(linear, dtype) for linear in module.all_linears()}
        module.take_off()
        replace_linears(model, trained)
    delattr(model, STATE_NAME)
    for parameter in model.parameters():  # buffers such as rotary frequencies keep their float32
        parameter.data = parameter.data.to(dtype)
    mark_quantized(model)


def mark_quantized(model: nn.Module) -> None:
    """Let transformers know: its `save_pretrained` would write tensors that its `from_pretrained` has no place for."""
    if isinstance(model, PreTrainedModel):
        setattr(model, "hf_quantizer", AutoHfQuantizer.from_config({"quant_method": QUANT_METHOD}))  # noqa: B010


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The frozen linears of a model by name."""
    return _modules_of(model, QuantizedLinear)


def replace_linears(model: nn.Module, frozen: Mapping[str, QuantizedLinear]) -> None:
    """Put frozen linears in the place of the linears of those names; of experts all that a parameter holds."""
    rest = dict(frozen)
    for experts in named_experts(model).values():
        if experts.linears[0] in rest:
            module = model.get_submodule(experts.owner)
            QuantizedExperts.put_on(module, experts.leaf, [rest.pop(name) for name in experts.linears])
            module.train(module.training)
    for name, linear in rest.items():
        parent, _, child = name.rpartition(".")
        linear.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), child, linear)


def _modules_of(model: nn.Module, kind: type[T]) -> dict[str, T]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}
