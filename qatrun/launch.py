"""`--processes N`: the same command in several processes of this machine, started and watched by torch."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from qatrun import ranks
from qatrun.errors import InputError, LostProcessError

SHUTDOWN = 600  # seconds that the others have to save and end once one of them has ended badly


def run_in_processes(asked: str | None) -> int | None:
    """Run this very command line in so many processes and return their exit code; None where this process is one of them,
    or one is enough.

    Args:
        asked: a number, or `auto`: one a GPU.
    Raises:
        InputError: no number, or another than those that are there.
        LostProcessError: one of them was ended from outside.
    """
    there = ranks.started().size
    num = there if asked is None else number_of(asked)
    if there > 1 and num != there:
        raise InputError(f"--processes {asked}: {there} were started already, by torchrun or accelerate launch")
    return _launch(num, sys.argv) if num > there else None


def number_of(asked: str) -> int:
    """What `--processes` says.

    Raises:
        InputError: no number.
    """
    if asked == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    if not asked.isascii() or not asked.isdigit() or not 1 <= int(asked) <= 1024:
        raise InputError(f"--processes {asked}: must be a number of processes, or auto (one a GPU)")
    return int(asked)


def _launch(num: int, arguments: Sequence[str]) -> int:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # lives longer than any of them
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
    }
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num)))
    context = start_processes(_one, (environment, list(arguments)), nprocs=num, join=False, start_method="spawn")
    with _passed_on(context.pids):
        try:
            while not context.join(grace_period=SHUTDOWN):
                pass
        except ProcessExitedException as error:
            if error.exit_code > 0:
                return int(error.exit_code)
            how = f"process {error.error_index} of {num} (counted from 0) was ended by {error.signal_name}"
            raise LostProcessError(f"{how}; the system may have had too little memory for it") from None
    return 0


def _one(rank: int, environment: Mapping[str, str], arguments: list[str]) -> None:
    """What each of them runs."""
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = arguments
    runpy.run_module("qatrun", run_name="__main__")


@contextmanager
def _passed_on(pids: Callable[[], list[int]]) -> Iterator[None]:
    """A signal that asks this process to end is theirs: they save, and this one ends when they have. A terminal sends its
    Ctrl-C to all of them by itself."""

    def pass_on(number: int, _frame: object) -> None:
        for pid in pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
