"""What is watched while a segment trains: statistics of every quantized tensor, the forgetting probe, alarms.

Nothing here changes a number of the training, and all of it is as resumable as the training itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from qatrun.data import Batch
from qatrun.errors import AlarmStop, DamagedFileError
from qatrun.files import read_rows
from qatrun.layout import ALARMS_FILE, METRICS_FILE, PROBE_FILE
from qatrun.model import text_config
from qatrun.quant import Mode
from qatrun.ranks import world
from qatrun.records.training import AlarmRow, MetricsRow
from qatrun.train.alarms import AlarmWatch
from qatrun.train.first_loss import mistake_in_input
from qatrun.train.metrics import RowsFile, surviving_alarms
from qatrun.train.parts import State, Stateful
from qatrun.train.probe import Probe
from qatrun.train.probe_alarms import Twin
from qatrun.train.segment import Segment, Watched
from qatrun.train.stepper import Stepper
from qatrun.train.tensors import TensorFile


class Monitor(Stateful):
    """Watches one segment.

    Attributes:
        stop: the alarm that ends the run, once there is one and `on_alarm` says so.
    """

    _alarms: RowsFile  # open from `start` to `close`

    def __init__(self, segment: Segment, stepper: Stepper, watched: Watched) -> None:
        self.segment, self.watched, self.config = segment, watched, segment.arm.monitor
        self.model, self.quant, self.autocast = stepper.model, stepper.quant, stepper.autocast
        slots = {} if segment.plan is None else segment.plan.slots()
        self.watch = AlarmWatch(self.config.alarms, slots, _twin(segment))
        self.probe: Probe | None = None
        self.stop: AlarmRow | None = None
        self._tables: list[tuple[int, Tensor]] = []
        self._of_input: list[AlarmRow] = []
        self._tensors = TensorFile(segment.folder, [str(slot) for slot in slots])

    def state_dict(self) -> State:
        """Of the alarms, and the statistics since the last part, where a checkpoint is written between two."""
        return self.watch.state_dict() | self._tensors.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.watch.load_state_dict(state)
        self._tensors.load_state_dict(state)

    def adopt(self, state: State) -> None:
        self.watch.adopt(state)

    def start(self, step: int) -> list[str]:
        """Open the files after `step` steps. At step 0 the start model is asked about the probe's text.

        Returns:
            Sentences on what cannot be watched, or is lost of what was.
        """
        folder, trunk = self.segment.folder, self.segment.trunk
        inherited = None if trunk is None else trunk / ALARMS_FILE
        alarms = folder / ALARMS_FILE
        rows = surviving_alarms(alarms, inherited, step)
        self._alarms = RowsFile(alarms, rows)
        lost = len(self.watch.raised) - len(rows)
        problems = [f"{alarms} has lost {lost} of {len(self.watch.raised)} alarms"] if lost > 0 else []
        self._tensors.begin(step)
        if self.config.probe is None or self.watched.text is None:
            return problems
        file = (trunk or folder) / PROBE_FILE
        if step == 0:
            self.probe = Probe.of_start(self.model, self.watched.text, self.config.probe.top_k, self.autocast)
            world().first(partial(self.probe.save, file))
        elif world().first(file.is_file):
            try:
                self.probe = Probe.load(file)
            except DamagedFileError as error:
                problems.append(f"no forgetting probe in {self.segment.name}: {error}")
        else:
            problems.append(
                f"no forgetting probe in {self.segment.name}: the start model was not asked before the first step"
            )
        return problems

    def begin_step(self, step: int) -> None:
        """Before the forward of the step that makes it `step`."""
        if self.quant is not None:
            every = self.config.sqnr_every
            self.quant.tally.measures_noise = every is not None and step % every == 0 and self._records(step)

    def end_step(self, step: int) -> dict[str, float]:
        """After the scales moved: keep the step's statistics; returns what a probe found, if one is due."""
        if self.quant is not None and self.quant.mode is not Mode.OFF:
            table = self.quant.tally.take()
            if self._records(step):
                self._tables.append((step, table))
        probe = self.config.probe
        ends = self.segment.arm.warmup.steps, self.segment.last_step  # are probed whatever the interval
        if self.probe is None or probe is None or (step % probe.every and step not in ends):
            return {}
        return {"nll_start": self.probe.start_nll, **self._ask(self.probe)}

    def see_first_loss(self, loss: float, batch: Batch) -> None:
        """Judge the text by the loss of the first step; an alarm is among those that `see` returns next."""
        vocab_size = text_config(self.model).vocab_size
        readable = {"ordered": self.watched.ordered, "fits": self.watched.fits}
        found = mistake_in_input(loss, batch, vocab_size, self.watched.held_out_nll, **readable)
        if found is not None:
            self._of_input += self.watch.see_input(1, found)

    def see(self, rows: Sequence[Mapping[str, Any]]) -> list[AlarmRow]:
        """Take in the steps since the last call, now that their numbers are here; returns new alarms."""
        tables = {step: table.cpu().numpy() for step, table in self._tables}
        self._tables = []
        alarms, self._of_input = self._of_input, []
        for row in rows:
            step = row["step"]
            if step in tables:
                self._tensors.add(step, tables[step])
                if row["phase"] == "qat":
                    alarms += self.watch.see_tensors(step, tables[step], self.config.every)
            if "nll_off" in row:
                alarms += self.watch.see_probe(step, row)
        for alarm in alarms:
            self._alarms.append(alarm)
        if alarms and self.config.on_alarm == "stop" and self.stop is None:
            self.stop = alarms[0]
        return alarms

    def write(self, step: int, *, due: bool) -> None:
        """Write what a checkpoint of this moment stands on.

        Args:
            due: whether it would be written in a run that is not stopped, too.
        """
        self._alarms.sync()
        if due:
            self._tensors.write(step)
        else:
            self._tensors.show()

    def raise_if_stopped(self) -> None:
        """
        Raises:
            AlarmStop: an alarm was to end the run.
        """
        if self.stop is not None:
            raise AlarmStop(
                f"stopped by an alarm (monitor.on_alarm) in {self.segment.name}, and saved: {self.stop['text']}\n"
                "to go on with other settings, add an arm that has them and run with --resume"
            )

    def close(self) -> None:
        self._alarms.close()

    def _records(self, step: int) -> bool:
        # An arm may repeat the end of a trunk whose last checkpoint is damaged; the trunk has recorded that already.
        repeated = self.segment.trunk is not None and step <= self.segment.arm.warmup.steps
        return step % self.config.every == 0 and not repeated

    def _ask(self, probe: Probe) -> dict[str, float]:
        """Loss, divergence, and accuracy of the mini-benchmark, with quantizers off and, once they are in use, on."""
        if self.quant is None:
            return self._ask_as_it_computes(probe, "off")
        with self.quant.computing(Mode.OFF):
            found = self._ask_as_it_computes(probe, "off")
        if self.quant.mode is Mode.QUANTIZE:
            self.quant.calibrate_dynamic()
            found |= self._ask_as_it_computes(probe, "on")
        return found

    def _ask_as_it_computes(self, probe: Probe, quantizers: str) -> dict[str, float]:
        nll, kl = probe.ask(self.model, self.autocast)
        found = {f"nll_{quantizers}": nll, f"kl_{quantizers}": kl}
        if self.watched.benchmark is not None:
            with self.autocast():
                accuracy = self.watched.benchmark(self.model)
            found |= {f"accuracy_{quantizers}/{task}": value for task, value in accuracy.items()}
        return found


def _twin(segment: Segment) -> Twin | None:
    """What is known of it by now."""
    if segment.twin is None:
        return None
    file = segment.twin / METRICS_FILE
    rows = read_rows(file, MetricsRow, skip_damaged=True) if file.is_file() else []
    return Twin.of_rows(segment.twin.name, rows)
