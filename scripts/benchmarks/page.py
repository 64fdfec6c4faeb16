"""The Markdown page of results: what was to be reached and what was, then every table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import grid_of, rows_of
from benchmarks.timing import Row

# What results are filed under, by device and, on a CPU, the kernels' instruction set.
DEVICES = {
    "cpu": "CPU, AVX-512",
    "cpu-avx2": "CPU, AVX2",
    "cpu-baseline": "CPU, baseline",
    "cpu-reference": "CPU, no kernels",
    "cuda": "GPU",
}
ALWAYS_SHOWN = ("cpu", "cuda")
LARGE = {"cpu": "64 MiB", "cuda": "1024 MiB"}  # the kernel benchmark's tensor that fits no cache


@dataclass(frozen=True)
class Goal:
    """A number that is to stay at or below a limit.

    Attributes:
        key: of the row; {large} stands for the device's largest tensor.
        limits: device -> largest acceptable value; a device that is missing only informs.
        to: key of a row that the value is divided by.
    """

    what: str
    key: str
    limits: Mapping[str, float]
    to: str = ""


def _goals() -> Iterator[Goal]:
    for dtype in ("fp32", "bf16"):
        for arm, what in (("hif8", "fake-quantize + amax"), ("hif8+mask", "the same + clip mask")):
            name = f"{what} / compiled scale-and-copy, HiF8, {dtype}"
            yield Goal(name, f"kernel/{dtype} {{large}}/{arm}", {"cpu": 1.25, "cuda": 1.25})
    step_limits = {"fp32": {"cpu": 1.10}, "bf16": {"cpu": 1.20, "cuda": 1.10}}
    for dtype, limits in step_limits.items():
        yield Goal(f"QAT step / unquantized step, HiF8, {dtype}", f"step/{dtype}/hif8", limits)
        yield Goal(f"… with 8-bit saved activations, {dtype}", f"step/{dtype}/hif8_codes", {})
    for dtype in step_limits:
        limits = {"cpu": 1.02, "cuda": 1.02}
        yield Goal(f"step with tensor statistics / without, {dtype}", f"watch/{dtype}/hif8", limits)
    equal = {"cpu": 1.0, "cuda": 1.0}
    for dtype in step_limits:
        hif8 = f"step/{dtype}/hif8"
        for arm, name in (("int8", "INT8"), ("fp8_e4m3", "E4M3")):
            yield Goal(f"{name} step / HiF8 step, {dtype}", f"step/{dtype}/{arm}", equal, to=hif8)
    for dtype in ("fp32", "bf16"):
        for case in (dtype, f"{dtype} compiled"):
            if case != dtype:
                yield Goal(f"HiF8 step / unquantized step, {case}", f"step/{case}/hif8", {})
            for arm, name in (("torchao_fp8", "FP8"), ("torchao_int8", "INT8")):
                yield Goal(f"torchao {name} QAT step / unquantized step, {case}", f"step/{case}/{arm}", {})
                yield Goal(
                    f"HiF8 step / torchao {name} QAT step, {case}", f"step/{case}/hif8", equal, to=f"step/{case}/{arm}"
                )
    for what, name, codes_limit in (("saved", "bytes saved for the backward", 0.92), ("peak", "peak memory", 0.99)):
        yield Goal(f"{name} / unquantized, bf16", f"memory/{what} bf16/hif8", {"cpu": 1.05, "cuda": 1.05})
        limits = {"cpu": codes_limit, "cuda": codes_limit}
        yield Goal("… with 8-bit saved activations", f"memory/{what} bf16/hif8_codes", limits)
    for dtype in ("fp32", "bf16"):
        yield Goal(f"scoring, quantizers on / off, HiF8, {dtype}", f"eval/{dtype}/hif8", {"cpu": 1.10, "cuda": 1.10})
    yield Goal("operations of a scale update, 64 layers / 8", "scaling/operations a push, 8 -> 64 layers/hif8", equal)
    yield Goal("second start, seconds beyond a step", "startup/second start/hif8", {"cpu": 5.0, "cuda": 5.0})


def goals_table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown lines: each goal, its limit and what each device reached.

    Args:
        results: device -> results file; a device that is missing reads "not measured".
    """
    rows = {device: {row.key: row for row in rows_of(found)} for device, found in results.items()}
    shown = [device for device in DEVICES if device in rows or device in ALWAYS_SHOWN]
    lines = [
        f"| what | goal (CPU / GPU) | {' | '.join(DEVICES[device] for device in shown)} |",
        f"|---|---|{'---|' * len(shown)}",
    ]
    for goal in _goals():
        limits = " / ".join(f"≤ {limit:g}" for limit in dict.fromkeys(goal.limits.values()))
        reached = " | ".join(_reached(goal, device, rows) for device in shown)
        lines.append(f"| {goal.what} | {limits} | {reached} |")
    return lines


def page(device: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page of a device.

    Args:
        results: device -> results file, of all devices that have one.
    """
    lines = [f"# Benchmarks, {DEVICES[device]}", ""]
    lines += goals_table(results)
    for name, section in results[device].items():
        rows = [Row(**row) for row in section["rows"]]
        lines += ["", f"## {name}", "", _provenance(section), "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _key(key: str, device: str) -> str:
    return key.format(large=LARGE[_kind(device)])


def _kind(device: str) -> str:
    return device.partition("-")[0]


def _reached(goal: Goal, device: str, rows: Mapping[str, Mapping[str, Row]]) -> str:
    if device not in rows:
        return "not measured"
    row, base = rows[device].get(_key(goal.key, device)), rows[device].get(goal.to)
    if row is None or (goal.to and base is None):
        return "-"
    value = row.value / (base.value if base else 1.0)
    limit = goal.limits.get(_kind(device))
    missed = limit is not None and round(value, 2) > limit
    spread = "" if base or row.n == 1 else f" ({row.low:.2f}-{row.high:.2f}, n {row.n})"
    return f"{'**' if missed else ''}{value:.2f}{'** (missed)' if missed else ''}{spread}"


def _provenance(section: Mapping[str, Any]) -> str:
    environment = section["environment"]
    packages = environment["packages"]
    hardware = (
        ", ".join(environment["gpus"]) or f"{environment['cpu']['model']}, {environment['cpu']['threads']} threads"
    )
    if "kernels" in environment["cpu"]:
        hardware += f", kernels {environment['cpu']['kernels'] or 'off'}, torch {environment['cpu']['torch']}"
    commit = environment["git"]["commit"][:10] if environment["git"] else "no commit"
    changed = " and changes" if environment["git"] and environment["git"]["dirty"] else ""
    versions = ", ".join(f"{name} {packages[name] or 'absent'}" for name in ("torch", "transformers", "torchao"))
    settings = ", ".join(f"{key} {value}" for key, value in section["settings"].items() if value)
    return f"{hardware}; {versions}; commit {commit}{changed}; {environment['date'][:10]}; {settings}"


def _table(rows: Sequence[Row]) -> list[str]:
    header, *lines = grid_of(rows)
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)]
