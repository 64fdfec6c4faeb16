"""Benchmarks of quantization-aware training, side by side with plain training and torchao.

    python scripts/bench.py all                             # everything, on screen
    python scripts/bench.py step --quick                    # one benchmark, few rounds
    python scripts/bench.py all --output scripts/bench_results     # and recorded: JSON, Markdown, bands, plot
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python scripts/bench.py all      # as on a CPU without AVX-512
    python scripts/bench.py all --quick --check scripts/bench_results   # exit 1 when a ratio left its recorded band

Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks import kernel, memory, page, report, scaling, scoring, startup, step, watching
from benchmarks.arms import NO_TORCHAO, SHAPES
from benchmarks.timing import Progress as ProgressProtocol
from benchmarks.timing import Row, Settings
from qatrun.numerics import native

BENCHMARKS: dict[str, Callable[[Settings, ProgressProtocol], list[Row]]] = {
    "kernel": kernel.benchmark,
    "step": step.benchmark,
    "watch": watching.benchmark,
    "memory": memory.benchmark,
    "eval": scoring.benchmark,
    "startup": startup.benchmark,
    "scaling": scaling.benchmark,
}


class Bars:
    """Progress on a terminal: a bar with ETA for the case that runs."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=console, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, case: str, rounds: int) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(case, total=rounds)

    def advance(self) -> None:
        if self._task is not None:
            self._bars.advance(self._task)


def environment() -> dict[str, Any]:
    """Hardware, versions, commit and date."""
    from qatrun.study.environment import describe_environment  # takes seconds

    described = describe_environment().to_dict()
    described["packages"]["torchao"] = importlib.metadata.version("torchao") if find_spec("torchao") else None
    return described


def kind_of(device: str) -> str:
    """What results are recorded by: the GPU, or the instruction set of the kernels in use on this CPU."""
    return device if device == "cuda" else f"cpu-{native.variant() or 'reference'}"


def record(folder: Path, kind: str, name: str, section: dict[str, Any]) -> None:
    """Put one benchmark's results in place of the earlier ones, and write what is derived from all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.json"
    results = report.read_results(path)
    results[name] = section
    results = {known: results[known] for known in BENCHMARKS if known in results}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    rows = report.rows_of(results)
    (folder / f"{kind}-bands.json").write_text(json.dumps(report.bands_of(rows), indent=1) + "\n", encoding="utf-8")
    kinds = dict.fromkeys([*page.KINDS, kind])
    every = {other: found for other in kinds if (found := report.read_results(folder / f"{other}.json"))}
    for other in every:
        (folder / f"{other}.md").write_text(page.page(other, every), encoding="utf-8")
    if name == "scaling" and any(row.unit == "exponent" for row in rows):
        scaling.plot(rows, folder / f"{kind}-scaling.svg")


def check(folder: Path, kind: str, rows: Sequence[Row], console: Console) -> int:
    """Exit code 1, with a line each, when ratios left their recorded bands."""
    bands = report.read_results(folder / f"{kind}-bands.json")
    complaints = report.outside(rows, bands)
    for line in complaints:
        console.print(line, style="red", markup=False, soft_wrap=True)
    if not complaints:
        console.print(f"all {sum(row.key in bands for row in rows)} ratios within their recorded bands")
    return int(bool(complaints))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(SHAPES), help="default: llama-35m on cpu, openpangu-1b on cuda")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--values", type=int, help="kernel: size of the tensor, a multiple of 512")
    parser.add_argument("--output", type=Path, metavar="DIR", help="record the results there")
    parser.add_argument("--check", type=Path, metavar="DIR", help="compare with the bands recorded there")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    model = arguments.model or ("openpangu-1b" if arguments.device == "cuda" else "llama-35m")
    settings = Settings(arguments.device, model, arguments.quick, arguments.values)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not find_spec("torchao"):
        console.print(f"skipped: torchao's columns; {NO_TORCHAO}", markup=False)
    names = list(BENCHMARKS) if arguments.benchmark == "all" else [arguments.benchmark]
    measured: list[Row] = []
    kind = kind_of(arguments.device)
    for name in names:
        with Bars(console) as bars:
            rows = BENCHMARKS[name](settings, bars)
        console.print(report.table_of(name, rows))
        measured += rows
        if arguments.output is not None:
            record(arguments.output, kind, name, report.section_of(rows, asdict(settings), environment()))
    return 0 if arguments.check is None else check(arguments.check, kind, measured, console)


if __name__ == "__main__":
    sys.exit(main())
