"""What the statistics of every tensor cost: the step that takes them beside the step that does not.

Fifty steps as a run has them: at each the statistics come out of the scale state and go past the alarms, at one SQNR is
measured as well, and once they are all written as Parquet.
"""

from __future__ import annotations

import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.arms import SHAPES, Trainee, trainee
from benchmarks.timing import Progress, Row, Settings, interleave, row_of
from qatrun.quant import QuantState
from qatrun.recipe import AlarmConfig
from qatrun.train.alarms import AlarmWatch
from qatrun.train.tensors import Table, TensorFile

STEPS = 50
ARM = "hif8"


def benchmark(settings: Settings, progress: Progress) -> list[Row]:
    """fp32 and bf16 autocast, HiF8; on a GPU bf16 alone."""
    cases = {"fp32": False, "bf16": True} if settings.device == "cpu" else {"bf16": True}
    return [_run(case, bf16, settings, progress) for case, bf16 in cases.items()]


def _run(case: str, bf16: bool, settings: Settings, progress: Progress) -> Row:
    rounds = 4 if settings.quick else 20
    progress.begin(f"watch {case}", rounds)
    plain, watched = (trainee(ARM, SHAPES[settings.model], settings.device, bf16=bf16) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        watching = _Watching(watched, Path(folder))
        contestants = {
            "plain": plain.step,
            "watched": watching.step,
            "with SQNR": watching.step_with_noise,
            "write": watching.write,
        }
        for run in contestants.values():
            run()
        seconds = interleave(contestants, rounds, settings.device, progress)
    plain_s, watched_s, noisy_s, write_s = (np.asarray(seconds[name]) for name in contestants)
    ratios = ((STEPS - 1) * watched_s + noisy_s + write_s) / (STEPS * plain_s)
    return row_of(ratios, "watch", case, ARM, reference="unwatched", absolute=float(np.median(ratios * plain_s)))


@dataclass
class _Watching:
    """A trainee whose statistics are taken as a run's are that looks at them every step."""

    made: Trainee
    folder: Path

    def __post_init__(self) -> None:
        assert self.made.plan is not None
        assert self.made.stepper.quant is not None
        self.state: QuantState = self.made.stepper.quant
        self.alarms = AlarmWatch(AlarmConfig(), self.made.plan.slots())
        self.tables: deque[Table] = deque(maxlen=STEPS)

    def step(self) -> None:
        """One step, its statistics on the host and past the alarms."""
        self.made.step()
        self.tables.append(self.state.tally.take().cpu().numpy())
        list(self.alarms.see_tensors(self.state.scales.num_pushes, self.tables[-1], 1))

    def step_with_noise(self) -> None:
        """The same with SQNR."""
        self.state.tally.measures_noise = True
        self.step()
        self.state.tally.measures_noise = False

    def write(self) -> None:
        """Write the statistics of as many steps."""
        file = TensorFile(self.folder, self.state.scales.names)
        for step in range(STEPS):
            file.add(step, self.tables[step % len(self.tables)])
        file.write(STEPS)
