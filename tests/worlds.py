"""Functions run in worlds of several gloo processes, which are forked from one that has imported everything: a world takes
half a second."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PRELOADED = [
    "qatrun.cli",
    "qatrun.study.runner",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.tensor",
]
TIMEOUT = 90.0  # seconds after which a world is taken to hang


class Worlds:
    """A running world.

    Attributes:
        processes: by rank.
    """

    def __init__(self, size: int, act: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._scratch = TemporaryDirectory()
        self.folder = Path(self._scratch.name)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.processes = [
            context.Process(
                target=_run,
                args=(act, arguments, self.folder, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a process a signal."""
        os.kill(self.processes[rank].pid or 0, number)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until something is so in the world."""
        until = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < until, self.log()
            time.sleep(0.02)

    def codes(self) -> list[int | None]:
        """Exit codes by rank, once all have ended; a world that hangs is a failure."""
        until = time.monotonic() + TIMEOUT
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hanging:
            self.kill(rank)
        assert not hanging, f"processes {hanging} hang:\n{self.log()}"
        return [process.exitcode for process in self.processes]

    def results(self) -> list[Any]:
        """What `act` returned, by rank."""
        assert not any(self.codes()), self.log()
        return [pickle.loads(file.read_bytes()) for file in sorted(self.folder.glob("result-*"))]

    def log(self, rank: int | None = None) -> str:
        """What they printed."""
        return "".join(file.read_text() for file in sorted(self.folder.glob(f"log-{'*' if rank is None else rank}")))


def in_world(size: int, act: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `act(*arguments)` returns on each process of a world, in which it is called on all together."""
    return Worlds(size, together, act, arguments).results()


def together(act: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    from qatrun import ranks

    started = ranks.start()
    with ranks.entered(started):
        return act(*arguments)


def cli_in_world(size: int, *arguments: str, cwd: Path, **environment: str) -> Worlds:
    """`torchrun --nproc_per_node SIZE -m qatrun ARGUMENTS` in a folder, without torchrun."""
    return Worlds(size, cli, list(arguments), str(cwd), **environment)


def cli(arguments: list[str], cwd: str) -> None:
    from qatrun.cli import main

    os.chdir(cwd)
    sys.argv = ["qatrun", *arguments]
    main()


def _run(act: Callable[..., Any], arguments: tuple[Any, ...], folder: Path, environment: Mapping[str, str]) -> None:
    import torch

    os.environ |= environment
    rank = environment["RANK"]
    log = os.open(folder / f"log-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    try:
        result = act(*arguments)
    except Exception:
        traceback.print_exc()
        os._exit(1)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # no waiting for threads of gloo
