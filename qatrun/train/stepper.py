"""One optimizer step: forward and backward over micro-batches, clipping, update, scales. It knows no file and no clock, so
that what is benchmarked is what trains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from qatrun.data import Batch
from qatrun.model import DTYPES
from qatrun.numerics import recomputed_products
from qatrun.quant import Mode, QuantPlan, QuantState, attach
from qatrun.ranks import world
from qatrun.recipe import ModelConfig, TrainConfig
from qatrun.train.coded_gather import CodedGathers
from qatrun.train.objective import CrossEntropy, Distillation, Objective
from qatrun.train.sharding import own_part, shard


class Taken(NamedTuple):
    """What a step came to; tensors are still being computed on the device.

    Attributes:
        terms: of the objective by name, `loss` among them, [] float32 each: means over the targets of the whole batch.
        grad_norm: [] float32, before clipping.
        num_saturated: [] int64, slots.
    """

    terms: Mapping[str, Tensor]
    grad_norm: Tensor
    num_saturated: Tensor | int

    @property
    def loss(self) -> Tensor:
        return self.terms["loss"]


class Stepper:
    """A model in training, with quantizers attached where there is a plan, and its optimizer.

    Attributes:
        num_steps: done so far; where there are several processes, random numbers are drawn by it.
        quant: their scales, in whatever mode the caller puts them; None without a plan.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        plan: QuantPlan | None,
        train: TrainConfig,
        dtypes: ModelConfig,
        teacher: Any = None,
    ) -> None:
        """
        Args:
            teacher: in the dtype that it computes in; needed where `train.distill` is given, and changed: it is frozen.
        """
        if train.gradient_checkpointing:
            options = {"use_reentrant": False, "context_fn": recomputed_products}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        self.accelerator, self.train, self.dtypes, self.world = accelerator, train, dtypes, world()
        self.num_steps = 0
        self.model = model.train()
        self.quant: QuantState | None = attach(model, plan) if plan is not None else None
        self.prepared = model if self.sharded else accelerator.prepare_model(model)
        if self.sharded:
            shard(model, self.world, accelerator.device)
        self._coded: CodedGathers | None = None
        if self.sharded and self.quant is not None:
            self.quant.to(accelerator.device).keeps_grids = False
            self._coded = CodedGathers(model, self.world)
        groups = list(_parameter_groups(model, train.weight_decay))
        self.optimizer = torch.optim.AdamW(groups, betas=train.betas, eps=train.eps, fused=True)
        self.objective: Objective = CrossEntropy()
        if (distill := train.distill) is not None:
            self.objective = Distillation(self._logits_of(teacher), distill.weight, distill.temperature)
        self._nonfinite = torch.zeros((), dtype=torch.bool, device=accelerator.device)

    def step(self, batch: Batch, learning_rate: float) -> Taken:
        """One optimizer step on a whole batch. Nothing in it waits for the device. From the first loss or gradient that
        is not finite on, no step updates a parameter."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        terms, grad_norm = self._reduced(self.accumulate_gradients(batch))
        if self.train.max_grad_norm is not None:
            clip_grads_with_norm_(self.model.parameters(), self.train.max_grad_norm, grad_norm)
        self._nonfinite |= ~(terms[0].isfinite() & grad_norm.isfinite())
        self.optimizer.found_inf = self._nonfinite.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self._coded is not None:
            self._coded.forget()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(dict(zip(self.objective.terms, terms, strict=True)), grad_norm, self._move_scales())

    def accumulate_gradients(self, batch: Batch) -> Tensor:
        """Backward over this process's micro-batches; returns what they add to the objective's terms, means over the
        targets of the whole batch, [num_terms]."""
        size = self.objective.size(batch)
        total = torch.zeros(len(self.objective.terms), device=self.accelerator.device)
        micro_batches = self.world.mine(batch.split(self.train.micro_batch_size))
        for number, micro in enumerate(micro_batches, start=1):
            if self.sharded:  # by the micro-batch, whichever process it is on
                of_all = (number - 1) * self.world.size + self.world.rank
                torch.manual_seed(_seed(self.train.seed, self.num_steps, of_all))
            if self.quant is not None:
                self.quant.last_micro_batch = number == len(micro_batches)
            terms = self.terms(micro, size)
            self.accelerator.backward(self._made_small(terms))
            total += terms.detach()
            self._push("microbatch")
        return total

    def terms(self, micro_batch: Batch, size: int) -> Tensor:
        """[num_terms], with their graph: what a micro-batch adds to the objective's terms of a batch of that size."""
        micro_batch = micro_batch.to(self.accelerator.device)
        with self.autocast():
            logits = self.prepared(input_ids=micro_batch.input_ids, use_cache=False).logits
        return self.objective.summed(logits, micro_batch) / size

    def loss(self, micro_batch: Batch, size: int) -> Tensor:
        """[], with its graph: what a micro-batch adds to what is made small."""
        return self._made_small(self.terms(micro_batch, size))

    def _made_small(self, terms: Tensor) -> Tensor:
        """[], of [num_terms]; a term of weight 0 has no part in it, whatever it is."""
        weighted = [weight * term for weight, term in zip(self.objective.weights, terms, strict=True) if weight]
        return torch.stack(weighted).sum()

    def _logits_of(self, teacher: Any) -> Callable[[Tensor], Tensor]:
        """What a teacher says, frozen and where the model is: of several processes each holds its part of it, too."""
        teacher = teacher.eval().requires_grad_(False)
        if self.sharded:
            shard(teacher, self.world, self.accelerator.device)
        else:
            teacher.to(self.accelerator.device)

        @torch.no_grad()
        def logits(input_ids: Tensor) -> Tensor:
            said: Tensor = teacher(input_ids=input_ids, use_cache=False).logits
            return said

        return logits

    def autocast(self) -> torch.autocast:
        """The compute dtype of the model. Not Accelerate's own, which is one a process: arms may differ."""
        wanted = DTYPES[self.dtypes.compute_dtype]
        enabled = wanted != DTYPES[self.dtypes.param_dtype]
        device = self.accelerator.device.type
        # Cached casts would hold every gathered weight until the forward ends.
        return torch.autocast(device, dtype=wanted, enabled=enabled, cache_enabled=not self.sharded)

    @property
    def sharded(self) -> bool:
        """Whether the model lies in parts on several processes."""
        return self.world.size > 1

    def _reduced(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """([num_terms] means, [] norm of all gradients as one vector), float32, of all processes, in one exchange. Squares
        are summed in float32 along rows, which no sharding splits, and in float64 over them, so that where parameters lie
        does not change the norm."""
        grads = [own_part(p.grad) for p in self.model.parameters() if p.grad is not None]
        squares = torch.stack([_row_norms(grad).double().square().sum() for grad in grads]).sum()
        together = self.world.total(torch.cat([terms.double(), squares[None]]))
        return together[:-1].float(), together[-1].sqrt().float()

    def _move_scales(self) -> Tensor | int:
        """After the update; [] int64, how many slots saturated in the step."""
        self._push("optimizer_step")
        if self.quant is None or self.quant.mode is Mode.OFF:
            return 0
        self.quant.tally.share(self.world)
        return self.quant.tally.num_saturated()

    def _push(self, unit: str) -> None:
        """Close a unit of the amax history, if it is one."""
        if self.quant is not None and self.quant.mode is not Mode.OFF and self.quant.scales.unit == unit:
            self.quant.push()


def _seed(*numbers: int) -> int:
    """A seed that differs where any of the numbers does."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little", signed=True)


def _row_norms(x: Tensor) -> Tensor:
    """[..., d] -> [...]; of a vector, whose rows are numbers, itself."""
    return torch.linalg.vector_norm(x, dim=-1) if x.dim() > 1 else x


def _parameter_groups(model: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Matrices decay; norms and biases, which are vectors, do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    yield {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay}
    yield {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}
