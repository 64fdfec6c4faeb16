"""What the forgetting probe says of a run, as alarms:

    forgetting     quantizers off, the loss on what the start model knew has risen by more than `forgetting_nats`
    divergence     so it has, and in the twin, which trains the same without quantizers, by less than half of that
    quantization   quantizers add more than `quantization_nats` to that loss
    moved          the KL from the start model is above `forgetting_kl`, or quantizers add more than `quantization_kl` to it,
                   while the loss has not risen: the model has moved, and lost nothing

each twice in a row. Only training without any quantizer tells whether a learning rate forgets: a rise is laid to it as a
fact where none is in use yet, or the twin has it, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qatrun import advice
from qatrun.recipe import AlarmConfig
from qatrun.records.training import MetricsRow

IN_A_ROW = 2


@dataclass(frozen=True)
class Twin:
    """The arm that trains the same without quantizers.

    Attributes:
        rises: step -> rise of its loss on what the start model knew, nats a token, of the steps that are known.
    """

    name: str
    rises: Mapping[int, float]

    @classmethod
    def of_rows(cls, name: str, rows: list[MetricsRow]) -> Twin:
        """As its metrics have it."""
        return cls(name, {row["step"]: rise for row in rows if (rise := rise_of(row)) is not None})


def rise_of(row: Mapping[str, Any]) -> float | None:
    """Of the loss on what the start model knew, quantizers off, nats a token; None where the step was not probed."""
    return row["nll_off"] - row["nll_start"] if "nll_off" in row and "nll_start" in row else None


class ProbeWatch:
    """Sees what probes find, and says what holds of it.

    Attributes:
        in_a_row: what holds -> for how many probes it has.
    """

    def __init__(self, config: AlarmConfig, twin: Twin | None) -> None:
        self.config, self.twin = config, twin
        self.in_a_row: Counter[str] = Counter()

    def see(self, step: int, probed: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(kind, sentence) of each alarm that holds at this step."""
        kl, rise = probed["kl_off"], probed["nll_off"] - probed["nll_start"]
        lost, moved = self._above("forgetting_nats", rise), self._above("forgetting_kl", kl)
        quantizes = "nll_on" in probed
        if lost:
            yield self._lost(step, rise, quantizes=quantizes)
        elif moved:
            how = self._how_it_moved("forgetting", rise)
            yield "moved", f"with quantizers off the model is {kl:.3f} nats per token from the start model {how}"
        if not quantizes:
            return
        added, kl_added = probed["nll_on"] - probed["nll_off"], probed["kl_on"] - kl
        costs, moves = self._above("quantization_nats", added), self._above("quantization_kl", kl_added)
        if costs:
            text = (
                f"quantizers add {added:.3f} nats per token to the loss on what the start model knew (alarm above "
                f"{self.config.quantization_nats:g}): {advice.QUANTIZATION}"
            )
            yield "quantization", text
        elif moves:
            how = self._how_it_moved("quantization", added)
            yield "moved", f"quantizers move the model {kl_added:.3f} nats per token further from the start model {how}"

    def _above(self, key: str, value: float) -> bool:
        """Whether it is above its threshold, and was at the probe before."""
        limit = getattr(self.config, key)
        holds = limit is not None and value > limit
        self.in_a_row[key] = self.in_a_row[key] + 1 if holds else 0
        return self.in_a_row[key] >= IN_A_ROW

    def _how_it_moved(self, kind: str, rise: float) -> str:
        limit, harmless = getattr(self.config, f"{kind}_kl"), getattr(self.config, f"{kind}_nats") or 0.0
        lost = ": moved, not lost" if rise <= harmless else ""
        return f"(alarm above {limit:g}), its loss on what that knew {rise:+.3f}{lost}"

    def _lost(self, step: int, rise: float, *, quantizes: bool) -> tuple[str, str]:
        text = (
            f"with quantizers off the loss on what the start model knew has risen by {rise:.3f} nats per token (alarm above "
            f"{self.config.forgetting_nats:g})"
        )
        if not quantizes:
            return "forgetting", f"{text}: training overwrites it; {advice.FORGETTING}"
        of_twin = self.twin.rises.get(step) if self.twin is not None else None
        if self.twin is None or of_twin is None:
            twin = (
                "a twin without quantizers" if self.twin is None else f"{self.twin.name}, its twin without quantizers"
            )
            return "forgetting", f"{text}: {advice.FORGETTING} if it rises in {twin}, too, which is not known yet"
        text += f", in its twin {self.twin.name} by {of_twin:.3f}"
        if of_twin < rise / 2:
            return "divergence", f"{text}: training under quantization lost it; {advice.DIVERGENCE}"
        return "forgetting", f"{text}: training overwrites it; {advice.FORGETTING}"
