"""Put quantizers on a model, take them off again, and freeze them for scoring.

state = attach(model, plan)     # every planned linear becomes a FakeQuantLinear on the same parameters
state.begin_quantizing()        # until then it computes as before
...
detach(model)                   # the very modules that were there before
freeze(model, dtype)            # instead: weights on their grid, scales fixed, for scoring and saving
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from qatrun.errors import InputError
from qatrun.quant.linear import FakeQuantLinear
from qatrun.quant.plan import QuantPlan
from qatrun.quant.quantized import QuantizedLinear
from qatrun.quant.quantizer import Quantizer
from qatrun.quant.slot import SlotQuantizer
from qatrun.quant.state import Mode, ScaleState

STATE_NAME = "quant_state"
T = TypeVar("T", bound=nn.Module)


def attach(model: nn.Module, plan: QuantPlan) -> ScaleState:
    """Replace the planned linears by fake-quantized ones that share their parameters.

    `state_dict` keys and parameters stay as they are. The state is registered on the model as `quant_state`, so it
    follows the model to a device and into a deep copy.

    Returns:
        the model's scale state, in mode OFF.
    Raises:
        InputError: the model has quantizers already.
    """
    if hasattr(model, STATE_NAME):
        raise InputError("the model has quantizers attached already; detach them first")
    state = ScaleState(plan).to(next(model.parameters()).device)
    quantizers = {
        name: SlotQuantizer(Quantizer.of_role(spec.role, plan), state, state.index[name]) for name, spec in plan.slots()
    }
    for name in plan.linears:
        of_role = {role: quantizers[plan.slot_name(name, role)] for role in plan.roles}
        original, saves_codes = model.get_submodule(name), plan.saved_activations == "codes"
        _replace(model, name, FakeQuantLinear(original, state, of_role, saves_codes=saves_codes))
    model.add_module(STATE_NAME, state)
    return state


def detach(model: nn.Module) -> None:
    """Undo `attach`: the original modules, with the parameters as training left them."""
    for name, module in _modules_of(model, FakeQuantLinear):
        _replace(model, name, module.original)
    if hasattr(model, STATE_NAME):
        delattr(model, STATE_NAME)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give an attached model scales from these batches of token ids ([batch, seq_len] each) alone: the largest amax of
    each tensor, whatever the plan's algorithm. It is left quantizing, in eval mode."""
    state: ScaleState = getattr(model, STATE_NAME)
    model.eval()
    observing: list[nn.Module] = [state, *(module for _, module in _modules_of(model, FakeQuantLinear))]
    for module in observing:
        module.training = True
    state.mode = Mode.OBSERVE
    for input_ids in batches:
        model(input_ids=input_ids, use_cache=False)
    state.push()
    model.eval()
    state.begin_quantizing()


@torch.no_grad()
def freeze(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn an attached model into what is deployed: weights rounded to their grid from the master weights, input
    scales fixed, everything else cast to `dtype`, the compute dtype. Per-token input scales stay dynamic, since they do
    not depend on the batch. The master weights of quantized linears are gone afterwards.

    Raises:
        InputError: nothing is attached, or no input was ever seen to take a scale from.
    """
    state = getattr(model, STATE_NAME, None)
    if state is None:
        raise InputError("only a model with quantizers attached can be frozen")
    if not state.primed:
        raise InputError("no scales to freeze yet: observe some batches and call begin_quantizing, or train")
    model.eval()
    state.calibrate_dynamic()
    for name, module in _modules_of(model, FakeQuantLinear):
        _replace(model, name, QuantizedLinear.from_trained(module, dtype))
    delattr(model, STATE_NAME)
    for parameter in model.parameters():  # buffers such as rotary frequencies keep their float32
        parameter.data = parameter.data.to(dtype)


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The frozen linears of a model by name."""
    return dict(_modules_of(model, QuantizedLinear))


def replace_linear(model: nn.Module, name: str, module: QuantizedLinear) -> None:
    """Put a frozen linear in the place of the linear of that name."""
    _replace(model, name, module)


def _modules_of(model: nn.Module, kind: type[T]) -> list[tuple[str, T]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)
