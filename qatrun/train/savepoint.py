"""What a segment's checkpoints hold: all that it needs to go on bit for bit, taken from its parts and given back to them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qatrun.errors import CheckpointError, RunError
from qatrun.layout import CHECKPOINTS
from qatrun.ranks import world
from qatrun.train.checkpoint import LARGE, Checkpoint, fill, large_shapes, write_checkpoint
from qatrun.train.parts import Moments, State, Stateful, Weights
from qatrun.train.segment import Segment


class Savepoint:
    """Of one segment.

    Attributes:
        parts: by name; those that a process does not have, such as the text that the first alone reads, are left out on it.
    """

    def __init__(self, segment: Segment, weights: Weights, moments: Moments, parts: Mapping[str, Stateful]) -> None:
        self.segment, self.weights, self.moments = segment, weights, moments
        self.parts: dict[str, Stateful] = {"model": weights, "optimizer": moments, **parts}

    def write(self, step: int, consumed: str) -> None:
        """Write a checkpoint of this moment; every process comes here.

        Args:
            consumed: hash of what this process has trained on.
        Raises:
            RunError: the processes do not agree on what all of them hold.
            WriteError: it cannot be written.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        _refuse_differences({"data": {"consumed": consumed}, "quant": parts.get("quant", {})})
        folder, config = self.segment.folder / CHECKPOINTS, self.segment.arm.train
        write_checkpoint(folder, Checkpoint(step, self.segment.identity, parts), config.keep_last, config.save_every)

    def restore(self, checkpoint: Checkpoint, *, from_trunk: bool) -> None:
        """Go on from a checkpoint of this segment, or begin with what its trunk hands down.

        Raises:
            CheckpointError: it is of another model.
        """
        in_parts = checkpoint.folder if world().size > 1 else None
        shapes = {name: tensor.shape for name, tensor in checkpoint.parts.get("model", {}).items()}
        if not self.weights.fit(shapes if in_parts is None else large_shapes(in_parts, "model")):
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} of {self.segment.name} is of another model"
            )
        if in_parts is not None:
            self.moments.begin()
            fill(in_parts, {name: self.parts[name].state_dict() for name in LARGE})
        for name, state in checkpoint.parts.items():
            if name not in self.parts or (name in LARGE and in_parts is not None):
                continue  # a trunk's quantizers are nothing to a BF16 arm
            part = self.parts[name]
            (part.adopt if from_trunk else part.load_state_dict)(state)


def _refuse_differences(parts: Mapping[str, State]) -> None:
    """Make sure that all processes hold the same of what is not shared out.

    Raises:
        RunError: they do not, with the names of what differs.
    """
    if world().size == 1:
        return
    own = {f"{part}/{name}": _digest(value) for part, state in parts.items() for name, value in state.items()}
    everywhere = world().gather(own)
    if differing := [name for name in own if len({digests.get(name) for digests in everywhere}) > 1]:
        raise RunError(
            f"the processes do not agree on {', '.join(differing)}, which all of them must hold alike: not saved; an "
            "error of qatrun's own or of the machine's, please report it. The last checkpoint is good"
        )


def _digest(value: Any) -> str:
    content = value.cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
    return hashlib.sha256(content).hexdigest()
