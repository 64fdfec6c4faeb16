"""The world: the processes that work on one command together, and what they exchange. torch is imported where there are
several.

    start()     the world that torchrun, accelerate launch or qatrun started this process in
    world()     the one that the code at hand runs in: that, within `followers.together`; else this process alone

Where several processes run the same code nothing may raise on one of them alone between two exchanges, or the others would
wait: what can, such as reading a file, goes through `first` or `shared_out`, which carry exceptions. One that comes all the
same ends its process, and with it, as connections break, the run.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from qatrun.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")

PATIENCE = "QATRUN_TIMEOUT"  # seconds that an exchange waits for a process that does not come; from the environment
PATIENT_FOR = 30 * 60


@dataclass(frozen=True)
class World:
    """As one of its processes sees it. All of them come to every exchange, in the same order. A world of one exchanges
    nothing: everything is its own."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def first(self, act: Callable[[], T]) -> T:
        """What `act` returns, or raises, on the first process, where alone it is called; on all of them."""
        return act()

    def gather(self, value: T) -> list[T]:
        """The values of all, by rank, on all of them."""
        return [value]

    def maximum(self, x: Tensor) -> Tensor:
        """The largest of all, value by value: exact, in whatever order they come. NaN counts as infinite."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum of all, value by value."""
        return x

    def agree(self, reason: str | None) -> str | None:
        """One reason on all processes: that of the first which has one."""
        return reason

    def mine(self, parts: Sequence[T]) -> Sequence[T]:
        """Which of the parts, the same on all processes, this one takes."""
        return parts[self.rank :: self.size]

    def shared_out(self, parts: Sequence[P], compute: Callable[[P], R]) -> list[R]:
        """`compute` of each part, in their order, each made by one process and given to all. All make the same number of
        calls, some of them once more and for nothing: a sharded model computes only where all processes do.

        Raises:
            what the first call that failed did, on all processes.
        """
        found: dict[int, R] = {}
        failure: Exception | None = None
        for turn in range(-(-len(parts) // self.size)):
            index = turn * self.size + self.rank
            try:
                found[index] = compute(parts[min(index, len(parts) - 1)])
            except Exception as error:
                if self.size == 1:
                    raise
                failure = failure or error
        for part in (gathered := self.gather((found, _portable(failure)))):
            if part[1] is not None:
                raise part[1]
        together = {index: result for results, _ in gathered for index, result in results.items()}
        return [together[index] for index in range(len(parts))]


ALONE = World()


class _Processes(World):
    """A world of several, on torch's process group."""

    def first(self, act: Callable[[], T]) -> T:
        import torch.distributed as dist

        box: list[Any] = [None]
        failure = None
        if self.leads:
            try:
                box = [(act(), None)]
            except Exception as error:
                failure, box = error, [(None, _portable(error))]
        dist.broadcast_object_list(box, src=0)
        value, raised = box[0]
        if raised is not None:
            raise failure or raised
        result: T = value
        return result

    def gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def maximum(self, x: Tensor) -> Tensor:
        import torch
        import torch.distributed as dist

        sent = torch.where(x.isnan(), torch.inf, x) if x.is_floating_point() else x.clone()
        dist.all_reduce(sent, op=dist.ReduceOp.MAX)
        return sent

    def total(self, x: Tensor) -> Tensor:
        import torch.distributed as dist

        sent = x.clone()
        dist.all_reduce(sent, op=dist.ReduceOp.SUM)
        return sent

    def agree(self, reason: str | None) -> str | None:
        import torch

        if not int(self.maximum(torch.tensor(int(reason is not None)))):  # on the CPU: no device waits for it
            return None
        return next(given for given in self.gather(reason) if given is not None)


_started: World = ALONE
_current: World | None = None


def start() -> World:
    """Join the world that this process was started in; a second call only says which that is.

    Raises:
        InputError: several processes were asked for, and one was started.
    """
    global _started, _current
    if _started.size > 1:
        return _started
    size = _size(os.environ)
    if size > 1:
        import torch
        import torch.distributed as dist

        backend = "gloo"
        if torch.cuda.is_available():
            backend, local_rank = "cpu:gloo,cuda:nccl", int(os.environ.get("LOCAL_RANK", "0"))
            if local_rank >= torch.cuda.device_count():
                raise InputError(
                    f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}"
                )
            torch.cuda.set_device(local_rank)
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=_patience())
        _started = _Processes(dist.get_rank(), dist.get_world_size())
        _current = ALONE
    return _started


def leave() -> None:
    """At the end of a program that went well."""
    if _started.size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def _size(environment: Mapping[str, str]) -> int:
    """How many processes a launcher says that it has started.

    Raises:
        InputError: it says too little, or started one where several were asked for.
    """
    size = environment.get("WORLD_SIZE", "")
    if size.isdigit() and int(size) > 1 and (missing := {"RANK", "MASTER_ADDR", "MASTER_PORT"} - environment.keys()):
        raise InputError(f"WORLD_SIZE is {size}, but {', '.join(sorted(missing))} is not set: start it with torchrun")
    if not size and environment.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in environment:
        raise InputError(
            "accelerate launch starts one process with --cpu, whatever --num_processes says: use `torchrun "
            "--nproc_per_node N -m qatrun ...`, or qatrun's own --processes N"
        )
    return int(size) if size.isdigit() else 1


def _patience() -> timedelta:
    given = os.environ.get(PATIENCE, str(PATIENT_FOR))
    if not given.isascii() or not given.isdigit() or not int(given):
        raise InputError(f"{PATIENCE}={given}: must be a number of seconds")
    return timedelta(seconds=int(given))


def started() -> World:
    """The whole world of this process, whoever in it the code at hand runs for."""
    return _started


def world() -> World:
    """The world that the code at hand runs in. In a program that is not qatrun's, its process group if it has one."""
    if _current is not None:
        return _current
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ALONE
    return _Processes(dist.get_rank(), dist.get_world_size())


@contextmanager
def entered(new: World) -> Iterator[None]:
    """Let code run in another world."""
    global _current
    before, _current = _current, new
    try:
        yield
    finally:
        _current = before


def _portable(error: Exception | None) -> Exception | None:
    """An exception that can be sent to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a library's exception is made of
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
