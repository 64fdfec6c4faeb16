"""Alarms: what goes wrong inside a run whose loss looks fine, each as a sentence a person can act on.

    saturation     a tensor clips more than `clip_fraction` of its values, as an average over `patience` steps
    resolution     a tensor's SQNR is below `sqnr_db` twice in a row
    forgetting     quantizers off, the model is further than `forgetting_kl` from the start model, twice in a row
    quantization   quantizers add more than `quantization_kl` to that, twice in a row

Each is raised once (of tensors: once a role), when it first holds. Thresholds are keys of `monitor.alarms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qatrun import advice
from qatrun.quant import STATISTICS
from qatrun.recipe import AlarmConfig
from qatrun.records.training import AlarmRow
from qatrun.scheme import Scheme, Slot
from qatrun.train.tensors import Table

PROBES_IN_A_ROW = 2


class AlarmWatch:
    """Sees the statistics as they come and says what is new about them."""

    def __init__(self, config: AlarmConfig, schemes: Mapping[Slot, Scheme]) -> None:
        """
        Args:
            schemes: of each quantized tensor, in the order of the statistics.
        """
        self.config, self.schemes, self.slots = config, schemes, list(schemes)
        self.role = np.array([slot.role for slot in self.slots])
        self.clipping = np.zeros(len(self.slots))  # clip fraction, exponential average over `patience` steps
        self.coarse_measurements = np.zeros(len(self.slots), dtype=np.int64)
        self.forgetting_probes = self.quantization_probes = 0
        self.raised: set[str] = set()

    def see_tensors(self, step: int, table: Table, steps_each: int) -> Iterator[AlarmRow]:
        """Statistics of one step, [num_tensors, len(STATISTICS)], which stand for `steps_each`."""
        columns = dict(zip(STATISTICS, table.T, strict=True))
        if self.config.clip_fraction is not None:
            share = min(1.0, steps_each / self.config.patience)
            clipped = np.nan_to_num(columns["clip_fraction"].astype(np.float64))
            self.clipping += share * (clipped - self.clipping)
            affected = self.clipping > self.config.clip_fraction
            yield from self._new(
                step, "saturation", affected, self.clipping, columns["overshoot"], self._saturation_text
            )
        measured = ~np.isnan(columns["sqnr_db"])
        if self.config.sqnr_db is not None and measured.any():
            coarse = columns["sqnr_db"] < self.config.sqnr_db
            self.coarse_measurements = np.where(coarse, self.coarse_measurements + 1, 0)
            affected = self.coarse_measurements >= PROBES_IN_A_ROW
            yield from self._new(
                step, "resolution", affected, -columns["sqnr_db"], columns["sqnr_db"], self._resolution_text
            )

    def see_probe(self, step: int, kl_off: float, kl_on: float | None) -> Iterator[AlarmRow]:
        """The forgetting probe; `kl_on` is None before the switch."""
        limit, added = self.config.forgetting_kl, self.config.quantization_kl
        self.forgetting_probes = self.forgetting_probes + 1 if limit is not None and kl_off > limit else 0
        if self.forgetting_probes >= PROBES_IN_A_ROW and self._first("forgetting"):
            text = (
                f"step {step}: with quantizers off the model is {kl_off:.3f} nats per token from the start model on "
                f"held-out text (alarm above {limit:g}): training overwrites what it knew; {advice.FORGETTING}"
            )
            yield AlarmRow(step=step, kind="forgetting", text=text, tensor=None)
        if kl_on is None or added is None:
            return
        self.quantization_probes = self.quantization_probes + 1 if kl_on - kl_off > added else 0
        if self.quantization_probes >= PROBES_IN_A_ROW and self._first("quantization"):
            text = (
                f"step {step}: quantizers move the model {kl_on - kl_off:.3f} nats per token further from the start "
                f"model (alarm above {added:g}): {advice.QUANTIZATION}"
            )
            yield AlarmRow(step=step, kind="quantization", text=text, tensor=None)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "clipping": self.clipping.tolist(),
            "coarse_measurements": self.coarse_measurements.tolist(),
            "forgetting_probes": self.forgetting_probes,
            "quantization_probes": self.quantization_probes,
            "raised": sorted(self.raised),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.clipping = np.array(state["clipping"], dtype=np.float64)
        self.coarse_measurements = np.array(state["coarse_measurements"], dtype=np.int64)
        self.adopt(state)
        self.quantization_probes = state["quantization_probes"]

    def adopt(self, state: Mapping[str, Any]) -> None:
        """What concerns the model as a whole."""
        self.forgetting_probes, self.raised = state["forgetting_probes"], set(state["raised"])

    def _first(self, key: str) -> bool:
        new = key not in self.raised
        self.raised.add(key)
        return new

    def _new(
        self,
        step: int,
        kind: str,
        affected: npt.NDArray[np.bool_],
        badness: npt.NDArray[Any],
        shown: Table,
        sentence: Callable[[str, Slot, float, float], str],
    ) -> Iterator[AlarmRow]:
        """An alarm for each role that has affected tensors for the first time."""
        for role in dict.fromkeys(self.role[affected]):
            if self._first(f"{kind}:{role}"):
                here = affected & (self.role == role)
                worst = int(np.argmax(np.where(here, badness, -np.inf)))
                how_many = f"{here.sum()} of {(self.role == role).sum()} {role}s"
                text = sentence(how_many, self.slots[worst], badness[worst], shown[worst])
                yield AlarmRow(step=step, kind=kind, text=f"step {step}: {text}", tensor=str(self.slots[worst]))

    def _saturation_text(self, how_many: str, worst: Slot, clipped: float, overshoot: float) -> str:
        return (
            f"{how_many} clip > {100 * (self.config.clip_fraction or 0):g} % of their values over "
            f"{self.config.patience} steps, worst {worst.linear} ({100 * clipped:.2g} %, overshoot "
            f"{overshoot:.1f}x): {advice.against_saturation(self.schemes[worst], overshoot)}"
        )

    def _resolution_text(self, how_many: str, worst: Slot, _: float, sqnr_db: float) -> str:
        return (
            f"{how_many} keep less than {self.config.sqnr_db:g} dB, worst {worst.linear} ({sqnr_db:.1f} dB): "
            f"{advice.RESOLUTION}"
        )
