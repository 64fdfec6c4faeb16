"""Kill `qatrun train` at random moments of the whole command (preflight, trunk, arms, scoring, comparison, diagnosis, page),
resume it each time, and compare what it ends in with a run that nobody stopped: the same files, bit for bit, the clock
aside. A study that comes to its end is begun again until all kills are spent.

    python scripts/kill_test.py --kills 50                             # half a minute a kill on one core
    python scripts/kill_test.py --kills 50 --set train.seeds=[0,1]     # a minute a kill
    python scripts/kill_test.py --kills 20 --processes 2               # one of two processes that train together
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from qatrun import cli
from qatrun.recipe import load_recipe

SMALL = (
    *("train.steps=24", "warmup.steps=10", "train.save_every=5", "qat.scaling.window=6", "train.global_batch_size=4"),
    *("train.micro_batch_size=2", "data.valid_sequences=8", "eval.limit=10", "diagnose.calibration_sequences=4"),
)
LAUNCHER_WAITS = 60  # seconds
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# What no two runs agree on: the clock, memory, and what hangs on them.
CLOCK = {"seconds", "tokens_per_second", "peak_memory_bytes", "cost", "date", "command"}
OF_THE_CLOCK = {"manifest.json", "comparison.txt", "report.html", "arms.csv", "lm_eval_results.json"}
OF_THE_PLACE = {"recipe.yaml", ".lock"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="over " + ", ".join(SMALL))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    overrides = [*SMALL, *arguments.overrides]
    name, rng = load_recipe(arguments.recipe, overrides).name, random.Random(arguments.seed)
    started, differing, num_studies = time.monotonic(), list[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run = _Command(arguments.recipe, overrides, root, arguments.processes, rng)
        length = run.to_the_end("whole")
        left = arguments.kills
        while left or num_studies == 0:
            shutil.rmtree(root / "killed", ignore_errors=True)
            ended = False
            while left and not (ended := run.until("killed", rng.uniform(0, length), rng.choice(SIGNALS))):
                left -= 1
            if not ended:
                run.to_the_end("killed")
            num_studies += 1
            differing += differences(root / "whole" / name, root / "killed" / name)
    print("\n".join(f"{count:4} {phase}" for phase, count in run.killed_in.most_common()))
    print(f"{arguments.kills} kills, {num_studies} studies, {time.monotonic() - started:.0f} s")
    print("identical" if not differing else "different: " + ", ".join(sorted(set(differing))))
    return int(bool(differing))


class _Command:
    """One `qatrun train`, in a folder of its own for each way it is treated."""

    def __init__(self, recipe: str, overrides: list[str], root: Path, num_processes: int, rng: random.Random) -> None:
        options = [option for override in overrides for option in ("--set", override)]
        self.arguments = ["train", recipe, *options, "--resume", "--set"]
        self.log = root / "log"
        self.root, self.num_processes, self.rng = root, num_processes, rng
        self.killed_in: Counter[str] = Counter()
        # Forked from a server that has imported everything: moments of an import are no moments of a study.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["qatrun.study.runner", "transformers.models.llama.modeling_llama"])

    def to_the_end(self, name: str) -> float:
        """Run it to its end; seconds."""
        began = time.monotonic()
        for process in self._start(name):
            process.join()
            self._check(process.exitcode, (0,))
        return time.monotonic() - began

    def until(self, name: str, seconds: float, number: signal.Signals) -> bool:
        """Run it for so long and send it, or one of its processes, a signal. Returns whether it came to its end all the
        same."""
        processes = self._start(name)
        hit = self.rng.choice(processes)
        hit.join(seconds)
        if hit.is_alive():
            os.kill(hit.pid, number)
            self.killed_in[_phase(self.log)] += 1
            print(f"{number.name} {_phase(self.log)}", flush=True)
        for process in processes:
            process.join(LAUNCHER_WAITS if len(processes) > 1 else None)
            if process.is_alive():  # as a launcher does to what is left
                process.kill()
                process.join()
            self._check(process.exitcode, (0, 3, 130, -number, -signal.SIGKILL))
        return all(process.exitcode == 0 for process in processes)

    def _start(self, name: str) -> list[Any]:
        arguments = [*self.arguments, f"output_dir={self.root / name}"]
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        processes = []
        for rank in range(self.num_processes):
            of_one = {**world, "WORLD_SIZE": str(self.num_processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = str(self.log) if rank == 0 else os.devnull
            process = self.context.Process(target=_run, args=(arguments, log, of_one if self.num_processes > 1 else {}))
            process.start()
            processes.append(process)
        return processes

    def _check(self, code: int, expected: tuple[int, ...]) -> None:
        if code not in expected:
            raise SystemExit(f"exit code {code}\n{self.log.read_text(encoding='utf-8')}")


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    with open(log, "w", encoding="utf-8") as stream:  # noqa: PTH123
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = ["qatrun", *arguments]
    torch.set_num_threads(1)  # models so small are slower on more
    cli.main()


def _phase(log: Path) -> str:
    """What the command said last that it does."""
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    said = [line for line in text.splitlines() if line.startswith(("training ", "scoring ", "seed ", "the page"))]
    return said[-1].partition(" step ")[0] if said else "start and preflight"


def differences(one: Path, other: Path) -> list[str]:
    """Files that are not the same, or that only one study has."""
    files = {path.relative_to(study) for study in (one, other) for path in study.rglob("*") if path.is_file()}
    compared = sorted(file for file in files if file.name not in OF_THE_CLOCK | OF_THE_PLACE)
    return [str(file) for file in compared if _content(one, file) != _content(other, file)]


def _content(study: Path, file: Path) -> str:
    if not (study / file).is_file():
        return "missing"
    content = (study / file).read_bytes()
    if file.suffix == ".md":  # a card says how the model of this place is opened
        content = content.replace(bytes(study.parent), b"")
    read = READERS.get(file.suffix, lambda content: hashlib.sha256(content).hexdigest())
    return read(content)


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clock(each) for key, each in value.items() if key not in CLOCK}
    return [_without_clock(each) for each in value] if isinstance(value, list) else value


def _in_order(content: bytes) -> str:
    """Of a safetensors file, whose header holds its metadata in no order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True)
    return header + hashlib.sha256(content[end:]).hexdigest()


READERS: dict[str, Callable[[bytes], str]] = {
    ".safetensors": _in_order,
    ".json": lambda content: json.dumps(_without_clock(json.loads(content))),
    ".jsonl": lambda content: json.dumps([_without_clock(json.loads(line)) for line in content.splitlines()]),
}


if __name__ == "__main__":
    sys.exit(main())
