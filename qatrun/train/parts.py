"""What can be resumed, and the parts of it that belong to nobody else: weights, optimizer, random numbers, clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from qatrun.train.memory import peak_memory_bytes, reset_peak_memory

State = Mapping[str, Any]  # name -> tensor, or plain data as JSON has it


class Stateful(Protocol):
    """Something that a checkpoint holds a part of."""

    def state_dict(self) -> State:
        """All that it needs to go on bit for bit."""

    def load_state_dict(self, state: State) -> None:
        """Go on as what gave this state, in the same run."""

    def adopt(self, state: State) -> None:
        """Begin an arm with what its trunk hands down."""
        self.load_state_dict(state)


class Weights(Stateful):
    """A model's parameters by name, tied ones once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> State:
        return dict(self.model.named_parameters())

    def fit(self, shapes: Mapping[str, torch.Size]) -> bool:
        """Whether they are of a model like this one."""
        return {name: p.shape for name, p in self.model.named_parameters()} == shapes

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[name])


class Moments(Stateful):
    """An optimizer's state as `<entry>/<parameter>`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parameters, self.optimizer = dict(model.named_parameters()), optimizer

    def state_dict(self) -> State:
        return {
            f"{entry}/{name}": value
            for name, parameter in self.parameters.items()
            for entry, value in self.optimizer.state[parameter].items()
        }

    def begin(self) -> None:
        """Make AdamW's state as it is before the first step, so that there is something to fill."""
        for parameter in self.parameters.values():
            zeros = (torch.zeros_like(parameter, requires_grad=False) for _ in range(2))
            step = torch.zeros((), device=parameter.device)
            self.optimizer.state[parameter] |= dict(zip(("step", "exp_avg", "exp_avg_sq"), (step, *zeros), strict=True))

    def load_state_dict(self, state: State) -> None:
        for key, value in state.items():
            entry, _, name = key.partition("/")
            parameter = self.parameters[name]
            self.optimizer.state[parameter][entry] = value.to(parameter.device)


class RandomNumbers(Stateful):
    """torch's generators, of the CPU and of the GPUs that are here."""

    def state_dict(self) -> State:
        on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state()} | {f"cuda{i}": state for i, state in enumerate(on_gpus)}

    def load_state_dict(self, state: State) -> None:
        torch.set_rng_state(state["cpu"])
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda{i}"], i)


class Clock(Stateful):
    """What a run has taken over all its stops.

    Attributes:
        seconds: in optimizer steps, the trunk's included.
    """

    def __init__(self) -> None:
        self.seconds, self._earlier_peak = 0.0, 0
        reset_peak_memory()

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory in use at once since it was made, or in an earlier stretch of the same run."""
        return max(self._earlier_peak, peak_memory_bytes())

    def state_dict(self) -> State:
        return {"seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes}

    def load_state_dict(self, state: State) -> None:
        self.adopt(state)
        self._earlier_peak = state["peak_memory_bytes"]

    def adopt(self, state: State) -> None:
        self.seconds = state["seconds"]
