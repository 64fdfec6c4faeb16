"""The training loop: one for trunk and arms, on Accelerate.

What differs between the two is data (see `Segment`). Optimizer steps are counted from 0 while they run, and by how many
are done everywhere a user sees them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from qatrun.data import Batch, PackedStream
from qatrun.errors import CheckpointError, Interrupted, NonFiniteError, SourceError
from qatrun.layout import CHECKPOINTS, METRICS_FILE
from qatrun.numerics import bfloat16_products
from qatrun.quant import Mode, QuantState, ResumableState, calibrate
from qatrun.ranks import world
from qatrun.records.training import Outcome
from qatrun.train.checkpoint import Checkpoint, latest_checkpoint
from qatrun.train.metrics import PendingRows, RowsFile, surviving_metrics
from qatrun.train.monitor import Monitor
from qatrun.train.nonfinite import first_bad_tensors
from qatrun.train.parts import Clock, Moments, RandomNumbers, Stateful, Weights
from qatrun.train.savepoint import Savepoint
from qatrun.train.schedule import learning_rate_at, mode_at
from qatrun.train.segment import Listener, Segment, Watched
from qatrun.train.signals import StopRequest, stop_on_signals
from qatrun.train.stepper import Stepper

# Device -> steps after which losses and norms are read from it, and checked; elsewhere after each, since reading is free.
FLUSH_EVERY = {"cuda": 10}


def train(
    segment: Segment,
    model: PreTrainedModel,
    stream: PackedStream | None,
    listener: Listener,
    trackers: Sequence[str],
    watched: Watched,
    teacher: PreTrainedModel | None = None,
) -> Outcome:
    """Train a segment to its end, from its newest checkpoint if it has one. Leaves the model with quantizers attached, and
    in parts where several processes train it, all of which come here.

    Args:
        stream: read by the process that leads; None on others.
        teacher: where `train.distill` wants one, in the dtype that it computes in.
    Raises:
        RunError: processes do not agree any more on what all of them have.
        AlarmStop: an alarm, with `monitor.on_alarm: stop`; the state was saved.
        NonFiniteError: a loss or gradient is NaN or Inf; the last checkpoint is good.
        SourceError: the data set breaks off; the state was saved.
        Interrupted: a signal asked for it; the state was saved.
        CheckpointError: the checkpoint belongs to another run.
        WriteError: a full disk, a missing permission; the last checkpoint is good.
    """
    with bfloat16_products(), stop_on_signals() as request:
        return Session(segment, model, stream, listener, trackers, watched, teacher).run(request)


class Session:
    """A segment while it runs: step after step, with phases, checkpoints, metrics and all that is watched.

    Attributes:
        stepper: what computes a step.
        step: optimizer steps done.
        savepoint: what its checkpoints hold.
        metrics: open while it runs.
    """

    metrics: RowsFile

    def __init__(
        self,
        segment: Segment,
        model: PreTrainedModel,
        stream: PackedStream | None,
        listener: Listener,
        trackers: Sequence[str],
        watched: Watched,
        teacher: PreTrainedModel | None,
    ) -> None:
        arm, self.clock, self.world = segment.arm, Clock(), world()
        self.segment, self.stream, self.listener = segment, stream, listener
        self.accelerator = Accelerator(log_with=list(trackers) or None, project_dir=segment.folder)
        self.stepper = Stepper(self.accelerator, model, segment.plan, arm.train, arm.model, teacher)
        self.quant = self.stepper.quant
        if trackers:
            settings = {key: str(value) for key, value in arm.model_dump().items()}  # as a tracker takes them
            self.accelerator.init_trackers(segment.folder.parent.name, config=settings)
        self.step = self.saved_step = 0
        self.pending, self.pending_batches = PendingRows(), list[Batch]()
        self.monitor = Monitor(segment, self.stepper, watched)
        micro_batches = arm.train.global_batch_size // arm.train.micro_batch_size // self.world.size
        self.observed_steps = _observed_steps(self.quant, micro_batches)
        self.consumed = hashlib.sha256()  # what this process was given since it started
        parts: dict[str, Stateful] = {"rng": RandomNumbers()}
        if stream is not None:
            parts["data"] = stream
        parts |= {"monitor": self.monitor, "clock": self.clock}
        if self.quant is not None:
            parts["quant"] = ResumableState(self.quant)
        self.savepoint = Savepoint(segment, Weights(model), Moments(model, self.stepper.optimizer), parts)

    def run(self, request: StopRequest) -> Outcome:
        """To the segment's end; raises as `train`."""
        self._start_or_resume()
        try:
            while not self.at_end:
                self._run_step()
                # Once: a signal that comes later is met after the next step. Only where numbers are read anyway, as to
                # agree is to wait.
                stop = self.world.agree(request.name) if self.world.size == 1 or not self.pending else None
                if self._due or stop or self.monitor.stop:
                    self._save()
                self.monitor.raise_if_stopped()
                if stop and not self.at_end:
                    raise self._interrupted(stop)
            if stop := self.world.agree(request.name):
                raise self._interrupted(stop)
        finally:
            self.metrics.close()
            self.monitor.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()
        data_hash = self.world.first(lambda: self._stream.data_hash)
        clock = self.clock.state_dict()
        peak = int(self.world.maximum(torch.tensor(clock["peak_memory_bytes"])))
        return Outcome(steps=self.step, data_hash=data_hash, **{**clock, "peak_memory_bytes": peak})

    @property
    def _stream(self) -> PackedStream:
        assert self.stream is not None  # on the process that leads
        return self.stream

    @property
    def at_end(self) -> bool:
        return self.step == self.segment.last_step

    @property
    def _due(self) -> bool:
        """Whether a checkpoint is written after this step whatever happens."""
        return self.at_end or self.step % self.segment.arm.train.save_every == 0

    def _interrupted(self, signal: str) -> Interrupted:
        return Interrupted(f"{signal} at step {self.step} of {self.segment.name}; saved")

    def _start_or_resume(self) -> None:
        """Take up the newest checkpoint of this segment, else the last one of its trunk, else the pretrained model."""
        own = self._latest_checkpoint(self.segment.folder)
        torch.manual_seed(self.segment.arm.train.seed)
        if own is not None:
            if own.identity != self.segment.identity:
                raise CheckpointError(
                    f"the checkpoints in {self.segment.folder} were made by a run with other settings"
                )
            self._restore(own, from_trunk=False)
        elif self.segment.trunk is not None:
            trunk = self._latest_checkpoint(self.segment.trunk)
            if trunk is None:
                raise CheckpointError(f"{self.segment.trunk} holds no whole checkpoint to branch from")
            self._restore(trunk, from_trunk=True)
        if own is None and self.segment.calibration is not None:
            self._calibrate(self.segment.calibration)
        self._open_metrics()
        for text in self.monitor.start(self.step):
            self.listener.on_warning(text)

    def _calibrate(self, batches: Sequence[Tensor]) -> None:
        """Give the first step its scales; the weights are smoothed already, see `study.joint`."""
        model, qat = self.stepper.model, self.segment.arm.qat
        assert qat is not None
        with self.stepper.autocast():
            least_error = qat.calibrating.input == "mse"
            calibrate(model, [batch.to(self.accelerator.device) for batch in batches], least_error=least_error)
        model.train()

    def _latest_checkpoint(self, folder: Path) -> Checkpoint | None:
        checkpoint, warnings = latest_checkpoint(folder / CHECKPOINTS)
        for text in warnings:
            self.listener.on_warning(text)
        return checkpoint

    def _restore(self, checkpoint: Checkpoint, *, from_trunk: bool) -> None:
        self.savepoint.restore(checkpoint, from_trunk=from_trunk)
        self.step = self.saved_step = checkpoint.step

    def _open_metrics(self) -> None:
        file, of_trunk = self.segment.folder / METRICS_FILE, self.segment.trunk
        inherited = None if of_trunk is None else of_trunk / METRICS_FILE
        rows, lost = surviving_metrics(file, inherited, self.step)
        self.metrics = RowsFile(file, rows)
        if lost:
            self.listener.on_warning(
                f"{file} has lost {len(lost)} of the first {self.step} steps (the first of them step {lost[0]}): the loss "
                f"of {self.segment.name} is compared with no other, and its curves have a gap"
            )

    def _run_step(self) -> None:
        """One optimizer step, and what is known of it. Nothing in it waits for the device."""
        self.pending.begin_step()
        arm = self.segment.arm
        batch = self._next_batch()
        mode = self._enter_phase()
        self.monitor.begin_step(self.step + 1)
        learning_rate = learning_rate_at(self.step, arm.train, arm.warmup)
        self.stepper.num_steps = self.step
        taken = self.stepper.step(batch, learning_rate)
        self.step += 1
        self.pending_batches.append(batch)
        self.pending.add(
            {
                "step": self.step,
                "phase": "qat" if mode is Mode.QUANTIZE else "bf16",
                **taken.terms,
                "learning_rate": learning_rate,
                "grad_norm": taken.grad_norm,
                "num_saturated": taken.num_saturated,
                "tokens": self.step * batch.input_ids.numel(),
                **self.monitor.end_step(self.step),
            }
        )
        if len(self.pending) >= FLUSH_EVERY.get(self.accelerator.device.type, 1):
            self._flush()

    def _next_batch(self) -> Batch:
        """What the step trains on, read once and given to all processes. Where there is no more to be had, the steps that
        were made are saved."""
        try:
            batch = self.world.first(lambda: self._stream.take(self.segment.arm.train.global_batch_size))
            self.consumed.update(batch.input_ids.numpy().tobytes())
            return batch
        except SourceError:
            if self.step > self.saved_step:
                self._save()
            raise

    def _enter_phase(self) -> Mode:
        if self.quant is None:
            return Mode.OFF
        mode = mode_at(
            self.step,
            switch_step=self.segment.switch_step,
            observed_steps=self.observed_steps,
            quantizes=self.segment.quantizes,
        )
        self.quant.enter(mode)
        return mode

    def _flush(self) -> None:
        """Read, check and report what the steps since the last flush gave."""
        if not self.pending:
            return
        rows, seconds = self.pending.take()
        batches, self.pending_batches = self.pending_batches, []
        for row, batch in zip(rows, batches, strict=True):
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                self._stop_on_nonfinite(row, batch)
            if row["step"] == 1:
                self.monitor.see_first_loss(row["loss"], batch)
            self.clock.seconds += seconds
            times = {"seconds": self.clock.seconds, "tokens_per_second": batch.input_ids.numel() / seconds}
            self._report(row | times)
        for alarm in self.monitor.see(rows):
            self.listener.on_alarm(alarm["text"])

    def _report(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=self.step)
        self.listener.on_step(row)

    def _save(self) -> None:
        """Write a checkpoint of this moment, once the steps that led to it are known to be sound."""
        self._flush()
        self.metrics.sync()  # a checkpoint must never be ahead of the metrics that led to it
        self.monitor.write(self.step, due=self._due)
        self.savepoint.write(self.step, self.consumed.hexdigest())
        self.saved_step = self.step

    def _stop_on_nonfinite(self, row: Mapping[str, Any], batch: Batch) -> NoReturn:
        self.stepper.accumulate_gradients(batch)  # as they were: no update has been made since
        input_ids = batch.to(self.accelerator.device).input_ids
        bad = first_bad_tensors(self.stepper.model, input_ids.split(self.segment.arm.train.micro_batch_size))
        what = f"loss {row['loss']}" if not math.isfinite(row["loss"]) else f"gradient norm {row['grad_norm']}"
        raise NonFiniteError(
            f"{what} at step {row['step']} of {self.segment.name}; first bad: {', '.join(bad) or 'unknown'}"
        )


def _observed_steps(quant: QuantState | None, micro_batches: int) -> int:
    """Optimizer steps that fill the longest window."""
    if quant is None:
        return 0
    return math.ceil(len(quant.scales.history) / (micro_batches if quant.scales.unit == "microbatch" else 1))
