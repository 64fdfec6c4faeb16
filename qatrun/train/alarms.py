"""Alarms: what goes wrong inside a run whose loss looks fine, each as a sentence a person can act on.

    saturation     a tensor clips more than `clip_fraction` of its values, as an average over `patience` steps
    resolution     a tensor's SQNR is below `sqnr_db` twice in a row

and those of the forgetting probe (`probe_alarms`) and of the first step (`first_loss`). Each is raised once (of tensors:
once a role), when it first holds. Thresholds are keys of `monitor.alarms`.
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
from qatrun.train.probe_alarms import IN_A_ROW, ProbeWatch, Twin
from qatrun.train.tensors import Table


class AlarmWatch:
    """Sees the statistics as they come and says what is new about them."""

    def __init__(self, config: AlarmConfig, schemes: Mapping[Slot, Scheme], twin: Twin | None = None) -> None:
        """
        Args:
            schemes: of each quantized tensor, in the order of the statistics.
            twin: what is known of the arm that trains the same without quantizers; None where there is none.
        """
        self.config, self.schemes, self.slots = config, schemes, list(schemes)
        self.role = np.array([slot.role for slot in self.slots])
        self.clipping = np.zeros(len(self.slots))  # clip fraction, exponential average over `patience` steps
        self.coarse_measurements = np.zeros(len(self.slots), dtype=np.int64)
        self.num_overshot, self.num_seen = np.zeros(len(self.slots), dtype=np.int64), 0  # steps
        self.raised: set[str] = set()
        self.probes = ProbeWatch(config, twin)

    def see_tensors(self, step: int, table: Table, steps_each: int) -> Iterator[AlarmRow]:
        """Statistics of one step, [num_tensors, len(STATISTICS)], which stand for `steps_each`."""
        columns = dict(zip(STATISTICS, table.T, strict=True))
        self.num_overshot += columns["overshoot"] > advice.STEADY
        self.num_seen += 1
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
            affected = self.coarse_measurements >= IN_A_ROW
            yield from self._new(
                step, "resolution", affected, -columns["sqnr_db"], columns["sqnr_db"], self._resolution_text
            )

    def see_probe(self, step: int, probed: Mapping[str, Any]) -> Iterator[AlarmRow]:
        """What the forgetting probe found: the row of the step."""
        for kind, text in self.probes.see(step, probed):
            if self._first(kind):
                yield AlarmRow(step=step, kind=kind, text=f"step {step}: {text}", tensor=None)

    def see_input(self, step: int, text: str) -> Iterator[AlarmRow]:
        """The text is not what it should be."""
        if self._first("input"):
            yield AlarmRow(step=step, kind="input", text=f"step {step}: {text}", tensor=None)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "clipping": self.clipping.tolist(),
            "num_overshot": self.num_overshot.tolist(),
            "num_seen": self.num_seen,
            "coarse_measurements": self.coarse_measurements.tolist(),
            "probes": dict(self.probes.in_a_row),
            "raised": sorted(self.raised),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.clipping = np.array(state["clipping"], dtype=np.float64)
        self.coarse_measurements = np.array(state["coarse_measurements"], dtype=np.int64)
        if "num_overshot" in state:  # an earlier version kept none
            self.num_overshot, self.num_seen = np.array(state["num_overshot"], dtype=np.int64), state["num_seen"]
        self.adopt(state)

    def adopt(self, state: Mapping[str, Any]) -> None:
        """What concerns the model as a whole."""
        self.raised = set(state["raised"])
        self.probes.in_a_row.update(state.get("probes", {}))

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
        sentence: Callable[[str, int, float, float], str],
    ) -> Iterator[AlarmRow]:
        """An alarm for each role that has affected tensors for the first time."""
        for role in dict.fromkeys(self.role[affected]):
            if self._first(f"{kind}:{role}"):
                here = affected & (self.role == role)
                worst = int(np.argmax(np.where(here, badness, -np.inf)))
                how_many = f"{here.sum()} of {(self.role == role).sum()} {role}s"
                text = sentence(how_many, worst, badness[worst], shown[worst])
                yield AlarmRow(step=step, kind=kind, text=f"step {step}: {text}", tensor=str(self.slots[worst]))

    def _saturation_text(self, how_many: str, worst: int, clipped: float, overshoot: float) -> str:
        slot, steady = self.slots[worst], bool(2 * self.num_overshot[worst] > self.num_seen)
        return (
            f"{how_many} clip > {100 * (self.config.clip_fraction or 0):g} % of their values over "
            f"{self.config.patience} steps, worst {slot.linear} ({100 * clipped:.2g} %, overshoot "
            f"{overshoot:.1f}x): {advice.against_saturation(self.schemes[slot], overshoot, steady=steady)}"
        )

    def _resolution_text(self, how_many: str, worst: int, _: float, sqnr_db: float) -> str:
        return (
            f"{how_many} keep less than {self.config.sqnr_db:g} dB, worst {self.slots[worst].linear} ({sqnr_db:.1f} dB): "
            f"{advice.RESOLUTION}"
        )
