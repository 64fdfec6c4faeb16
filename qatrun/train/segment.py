"""What the training loop is given.

A *segment* is a stretch of training with its own folder: a trunk from step 0 to the branch point, or an arm from there
to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qatrun.quant import QuantPlan
from qatrun.recipe import Arm


class Listener(Protocol):
    """Who is told how training goes."""

    def on_step(self, row: Mapping[str, Any]) -> None:
        """After each optimizer step: the row that went to metrics.jsonl."""

    def on_warning(self, text: str) -> None:
        """Something a person should know."""

    def on_alarm(self, text: str) -> None:
        """Something goes wrong inside the run."""


@dataclass(frozen=True)
class Segment:
    """A stretch of training.

    Attributes:
        arm: the settings; for a trunk those that its arms share.
        folder: where checkpoints and metrics.jsonl go.
        plan: what quantizers watch (trunk) or quantize (arm); None leaves the model as it is.
        quantizes: False for a trunk.
        last_step: how many optimizer steps are done when it ends.
        switch_step: first step with fake quantization, or a trunk's branch point.
        trunk: folder of the segment it starts from, or None for the pretrained model.
        twin: that of the arm that trains the same without quantizers; None for a trunk and where there is no such arm.
        calibration: [batch, seq_len] token ids each, that the scales of the first step come from, and the smoothing of the
            weights; None: the scales come from the trunk's history, or there is none.
        identity: hash of everything that decides the outcome; a checkpoint of another identity is refused.
    """

    name: str
    arm: Arm
    folder: Path
    plan: QuantPlan | None
    quantizes: bool
    last_step: int
    switch_step: int
    trunk: Path | None
    identity: str
    twin: Path | None = None
    calibration: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Watched:
    """What training is held against.

    Attributes:
        text: [num, seq_len] int64 token ids of what the start model knew; None: no forgetting probe.
        benchmark: model -> task -> accuracy, on a fixed subset of items, asked with the probe; None: no mini-benchmark.
        held_out_nll: of the start model, nats a token, on held-out text of the source that is trained on; None: none.
        ordered: whether words of the text that the first step is made on are known not to follow each other at random.
        fits: whether the tokenizer is known to be the start model's.
    """

    text: Tensor | None = None
    benchmark: Callable[[Any], Mapping[str, float]] | None = None
    held_out_nll: float | None = None
    ordered: bool = False
    fits: bool = False
