"""The training loop: one for trunk and arms, on Accelerate.

What differs between the two is data (see `Segment`). Optimizer steps are counted from 0 while they run, and by how many
are done everywhere a user sees them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from qatrun.data import IGNORE_INDEX, Batch, PackedStream
from qatrun.errors import CheckpointError, Interrupted, NonFiniteError, SourceError
from qatrun.model import DTYPES, text_config
from qatrun.numerics import bfloat16_products, recomputed_products
from qatrun.quant import Mode, ScaleState, attach
from qatrun.recipe import Arm
from qatrun.train.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    restore_rng,
    rng_tensors,
    write_checkpoint,
)
from qatrun.train.memory import peak_memory_bytes, reset_peak_memory
from qatrun.train.metrics import PendingRows, RowsFile, surviving_metrics
from qatrun.train.monitor import Monitor
from qatrun.train.nonfinite import first_bad_tensors
from qatrun.train.schedule import learning_rate_at, mode_at
from qatrun.train.segment import Listener, Outcome, Segment, Watched
from qatrun.train.signals import stop_on_signals

# A loss this close to that of a uniform guess means labels or weights are wrong, not that the text is hard.
UNIFORM_GUESS_SHARE = 0.9

# Device -> steps after which losses and norms are read from it, and checked; elsewhere after each, since reading is free.
FLUSH_EVERY = {"cuda": 10}

NOTHING_WATCHED = Watched()


def train(
    segment: Segment,
    model: PreTrainedModel,
    stream: PackedStream,
    listener: Listener,
    trackers: Sequence[str] = (),
    watched: Watched = NOTHING_WATCHED,
) -> Outcome:
    """Train a segment to its end, from its newest checkpoint if it has one. Leaves the model with quantizers attached.

    Raises:
        AlarmStop: an alarm, with `monitor.on_alarm: stop`; the state was saved.
        NonFiniteError: a loss or gradient is NaN or Inf; the last checkpoint is good.
        SourceError: the data set breaks off; the state was saved.
        Interrupted: a signal asked for it; the state was saved.
        CheckpointError: the checkpoint belongs to another run.
        WriteError: a full disk, a missing permission; the last checkpoint is good.
    """
    reset_peak_memory()
    with bfloat16_products(), stop_on_signals() as request:
        session = _Session(segment, model, stream, listener, trackers, watched)
        session.start_or_resume()
        try:
            while session.step < segment.last_step:
                session.run_step()
                stop = request.name  # looked at once: a signal that comes later is met after the next step
                if session.due or stop or session.monitor.stop:
                    session.save()
                session.monitor.raise_if_stopped()
                if stop and not session.at_end:
                    raise Interrupted(f"{stop} at step {session.step} of {segment.name}; saved")
            if request.name:
                raise Interrupted(f"{request.name} at step {session.step} of {segment.name}; saved")
        finally:
            session.close()
    return Outcome(session.step, stream.data_hash, session.seconds, max(session.earlier_peak, peak_memory_bytes()))


class _Session:
    """The moving parts of a segment while it runs."""

    def __init__(
        self,
        segment: Segment,
        model: PreTrainedModel,
        stream: PackedStream,
        listener: Listener,
        trackers: Sequence[str],
        watched: Watched,
    ) -> None:
        config = segment.arm.train
        self.segment, self.stream, self.listener = segment, stream, listener
        self.accelerator = Accelerator(log_with=list(trackers) or None, project_dir=segment.folder)
        if config.gradient_checkpointing:
            options = {"use_reentrant": False, "context_fn": recomputed_products}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        self.plain_model = model.train()
        self.quant: ScaleState | None = attach(model, segment.plan) if segment.plan is not None else None
        self.model = self.accelerator.prepare_model(model)
        self.optimizer = torch.optim.AdamW(
            list(_parameter_groups(model, config.weight_decay)), betas=config.betas, eps=config.eps, fused=True
        )
        if trackers:
            self.accelerator.init_trackers(segment.folder.parent.name, config=_flat_settings(segment.arm))
        self.step, self.saved_step, self.seconds, self.earlier_peak = 0, 0, 0.0, 0
        self.metrics: RowsFile | None = None
        self.pending, self.pending_batches = PendingRows(), list[Batch]()
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        self.monitor = Monitor(segment, model, self.quant, watched, self._autocast)
        self.observed_steps = _observed_steps(self.quant, config.global_batch_size // config.micro_batch_size)

    @property
    def at_end(self) -> bool:
        return self.step == self.segment.last_step

    @property
    def due(self) -> bool:
        """Whether a checkpoint is written after this step whatever happens."""
        return self.at_end or self.step % self.segment.arm.train.save_every == 0

    def start_or_resume(self) -> None:
        """Take up the newest checkpoint of this segment, else the last one of its trunk, else the pretrained model."""
        own = self._latest_checkpoint(self.segment.folder)
        torch.manual_seed(self.segment.arm.train.seed)
        if own is not None:
            self._restore(own, from_trunk=False)
        elif self.segment.trunk is not None:
            trunk = self._latest_checkpoint(self.segment.trunk)
            if trunk is None:
                raise CheckpointError(f"{self.segment.trunk} holds no whole checkpoint to branch from")
            self._restore(trunk, from_trunk=True)
        file, of_trunk = self.segment.folder / "metrics.jsonl", self.segment.trunk
        inherited = None if of_trunk is None else of_trunk / "metrics.jsonl"
        rows, lost = surviving_metrics(file, inherited, self.step)
        self.metrics = RowsFile(file, rows)
        if lost:
            self.listener.on_warning(
                f"{file} has lost {len(lost)} of the first {self.step} steps (the first of them step {lost[0]}): the loss "
                f"of {self.segment.name} is compared with no other, and its curves have a gap"
            )
        for text in self.monitor.start(self.step, own):
            self.listener.on_warning(text)

    def run_step(self) -> None:
        """One optimizer step: micro-batches, clipping, update, scales. Nothing in it waits for the device."""
        self.pending.begin_step()
        config = self.segment.arm.train
        batch = self._next_batch()
        mode = self._enter_phase()
        self.monitor.begin_step(self.step + 1)
        learning_rate = learning_rate_at(self.step, config, self.segment.arm.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self._accumulate_gradients(batch, config.micro_batch_size)
        parameters = [p for p in self.plain_model.parameters() if p.grad is not None]
        grad_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if config.max_grad_norm is not None:
            clip_grads_with_norm_(parameters, config.max_grad_norm, grad_norm)
        # From the first loss or gradient that is not finite on, the fused optimizer holds every update back.
        self.nonfinite |= ~(loss.isfinite() & grad_norm.isfinite())
        self.optimizer.found_inf = self.nonfinite.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        num_saturated: int | Tensor = 0
        if self.quant is not None and mode is not Mode.OFF:
            if self.quant.unit == "optimizer_step":
                self.quant.push()
            num_saturated = self.quant.take_num_saturated()
        self.step += 1
        self.pending_batches.append(batch)
        self.pending.add(
            {
                "step": self.step,
                "phase": "qat" if mode is Mode.QUANTIZE else "bf16",
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "num_saturated": num_saturated,
                "tokens": self.step * batch.input_ids.numel(),
                **self.monitor.end_step(self.step),
            }
        )
        if len(self.pending) >= FLUSH_EVERY.get(self.accelerator.device.type, 1):
            self.flush()

    def flush(self) -> None:
        """Read, check and report what the steps since the last flush gave."""
        if not self.pending:
            return
        rows, seconds = self.pending.take()
        batches, self.pending_batches = self.pending_batches, []
        for row, batch in zip(rows, batches, strict=True):
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                self._stop_on_nonfinite(row, batch)
            if row["step"] == 1:
                self._warn_if_guessing(row["loss"])
            self.seconds += seconds
            self._report(row | {"seconds": self.seconds, "tokens_per_second": batch.input_ids.numel() / seconds})
        for alarm in self.monitor.see(rows):
            self.listener.on_alarm(alarm.text)

    def save(self) -> None:
        """Write a checkpoint of this moment, once the steps that led to it are known to be sound."""
        self.flush()
        assert self.metrics is not None
        self.metrics.sync()  # a checkpoint must never be ahead of the metrics that led to it
        state = rng_tensors()
        progress: dict[str, Any] = {
            "step": self.step,
            "identity": self.segment.identity,
            "data": self.stream.position(),
            "seconds": self.seconds,
            "peak_memory_bytes": max(self.earlier_peak, peak_memory_bytes()),
            "monitor": self.monitor.save(self.step, due=self.due),
        }
        state |= self.monitor.tensors()
        if self.quant is not None:
            state |= {f"quant/{name}": tensor for name, tensor in self.quant.tensors().items()}
            progress["quant"] = self.quant.counters()
        checkpoint = Checkpoint(
            model=dict(self.plain_model.named_parameters()),
            optimizer=optimizer_tensors(self.plain_model, self.optimizer),
            state=state,
            progress=progress,
        )
        config = self.segment.arm.train
        write_checkpoint(self.segment.folder / "checkpoints", checkpoint, config.keep_last, config.save_every)
        self.saved_step = self.step

    def close(self) -> None:
        """Let go of files and trackers."""
        if self.metrics is not None:
            self.metrics.close()
        self.monitor.close()
        self.accelerator.end_training()

    def _latest_checkpoint(self, folder: Path) -> Checkpoint | None:
        checkpoint, warnings = latest_checkpoint(folder / "checkpoints")
        for text in warnings:
            self.listener.on_warning(text)
        return checkpoint

    def _restore(self, checkpoint: Checkpoint, *, from_trunk: bool) -> None:
        if not from_trunk and checkpoint.progress["identity"] != self.segment.identity:
            raise CheckpointError(f"the checkpoints in {self.segment.folder} were made by a run with other settings")
        parameters = dict(self.plain_model.named_parameters())
        if {name: p.shape for name, p in parameters.items()} != {name: t.shape for name, t in checkpoint.model.items()}:
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} of {self.segment.name} is of another model"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(checkpoint.model[name])
        restore_optimizer(self.plain_model, self.optimizer, checkpoint.optimizer)
        restore_rng(checkpoint.state)
        self.stream.seek(checkpoint.progress["data"])
        self.step, self.saved_step, self.seconds = checkpoint.step, checkpoint.step, checkpoint.progress["seconds"]
        if self.quant is not None and "quant" in checkpoint.progress:
            take = self.quant.adopt_history if from_trunk else self.quant.restore
            take(checkpoint.quant_tensors(), checkpoint.progress["quant"])
        watch = self.monitor.watch
        (watch.inherit if from_trunk else watch.restore)(checkpoint.progress["monitor"])
        if not from_trunk:
            self.earlier_peak = checkpoint.progress["peak_memory_bytes"]

    def _next_batch(self) -> Batch:
        """What the step trains on. Where there is no more to be had, the steps that were made are saved."""
        try:
            return self.stream.take(self.segment.arm.train.global_batch_size)
        except SourceError:
            if self.step > self.saved_step:
                self.save()
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
        if mode is Mode.QUANTIZE and self.quant.mode is not Mode.QUANTIZE:
            self.quant.begin_quantizing()
        self.quant.mode = mode
        return mode

    def _accumulate_gradients(self, batch: Batch, micro_batch_size: int) -> Tensor:
        """Backward over all micro-batches; returns the mean loss, [], over the targets of the whole batch."""
        num_targets = max(1, batch.num_targets)
        total = torch.zeros((), device=self.accelerator.device)
        micro_batches = batch.split(micro_batch_size)
        for number, micro in enumerate(micro_batches, start=1):
            if self.quant is not None:
                self.quant.last_micro_batch = number == len(micro_batches)
            input_ids, labels = (t.to(self.accelerator.device) for t in (micro.input_ids, micro.labels))
            with self._autocast():
                logits = self.model(input_ids=input_ids, use_cache=False).logits
            loss = summed_loss(logits, labels) / num_targets
            self.accelerator.backward(loss)
            total += loss.detach()
            if self.quant is not None and self.quant.unit == "microbatch" and self.quant.mode is not Mode.OFF:
                self.quant.push()
        return total

    def _autocast(self) -> torch.autocast:
        """The compute dtype of the arm. Not Accelerate's own, which is one a process: arms may differ."""
        wanted = DTYPES[self.segment.arm.model.compute_dtype]
        enabled = wanted != DTYPES[self.segment.arm.model.param_dtype]
        return torch.autocast(self.accelerator.device.type, dtype=wanted, enabled=enabled)

    def _stop_on_nonfinite(self, row: Mapping[str, Any], batch: Batch) -> NoReturn:
        micro_batch_size = self.segment.arm.train.micro_batch_size
        self._accumulate_gradients(batch, micro_batch_size)  # as they were: no update has been made since
        bad = first_bad_tensors(self.plain_model, batch.input_ids.to(self.accelerator.device).split(micro_batch_size))
        what = f"loss {row['loss']}" if not math.isfinite(row["loss"]) else f"gradient norm {row['grad_norm']}"
        raise NonFiniteError(
            f"{what} at step {row['step']} of {self.segment.name}; first bad: {', '.join(bad) or 'unknown'}"
        )

    def _warn_if_guessing(self, loss: float) -> None:
        uniform = math.log(text_config(self.plain_model).vocab_size)
        if loss > UNIFORM_GUESS_SHARE * uniform:
            self.listener.on_warning(
                f"the first loss is {loss:.2f}, near ln(vocabulary) = {uniform:.2f}: a pretrained model that only "
                "guesses. Check that model and tokenizer belong together and that its weights are pretrained"
            )

    def _report(self, row: dict[str, Any]) -> None:
        assert self.metrics is not None
        self.metrics.append(row)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=self.step)
        self.listener.on_step(row)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each next token, summed, in float32. This is where labels are shifted, once.

    Args:
        logits: [batch, seq_len, vocab].
        labels: [batch, seq_len], not shifted; IGNORE_INDEX is not counted.
    """
    predictions = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(predictions, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def _parameter_groups(model: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Matrices decay; norms and biases, which are vectors, do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    yield {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay}
    yield {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}


def _observed_steps(quant: ScaleState | None, micro_batches: int) -> int:
    """Optimizer steps that fill the longest window."""
    if quant is None:
        return 0
    return math.ceil(len(quant.history) / (micro_batches if quant.unit == "microbatch" else 1))


def _flat_settings(arm: Arm) -> dict[str, str]:
    """Settings as a tracker takes them."""
    return {key: str(value) for key, value in arm.model_dump().items()}
