"""What faults.csv and healthy.csv say, as tables of a document: is the diagnosis right, and are the alarms?"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from scipy.stats import beta

Row = Mapping[str, str]

MISTAKES = ("missed", "hid", "accused")  # the later, the heavier
LOOKED_AT = {"gpt2": (2, 3, 4, 5), "opt": (0,), "mixtral": (0,)}  # seeds, while the rule was mended
LOOKED_AT_OTHERWISE = (1, 2)
ALL, OTHERS = "all, judging", "all, looked at"
NAMES = {
    "stories260K": "stories, Llama 0.26M",
    "gut3m": "books, Llama 3.4M",
    "demo": "demo, Llama 2.7M",
    "code": "Python, GPT-NeoX 0.8M",
    "gpt2": "stories, GPT-2 1.0M",
    "opt": "demo, OPT 0.9M",
    "mixtral": "C++, Mixtral 2.0M",
    "qwen3": "manual, Qwen3 4.8M",
}
DIAGNOSIS = (
    *("model", "harmful", "missed", "hid", "misnamed", "wrong, at most"),
    *("healthy", "accused", "at most", "not shown", "open"),
)
ALARMS = (
    *("model", "harmful", "alarmed", "at least", "delay, steps", "arms", "falsely", "at most"),
    *("healthy over seeds", "falsely", "at most"),
)


def diagnosis(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """For each model, and for all, on the seeds that judge, then for all on those that were looked at: harmful and healthy
    cells, how many of them were answered wrongly (and the upper end of the share's interval), healthy ones that were not
    ruled out, and cells of which the rule cannot tell. Right is also what is not shown, where it is as small as is said.

    Args:
        rows: of faults.csv.
    Returns:
        rows of the columns DIAGNOSIS.
    """
    return [(name, *_answers(part)) for name, part in _parts(rows).items()]


def alarms(rows: Sequence[Row], healthy: Sequence[Row]) -> list[tuple[str, ...]]:
    """For each model, on the seeds that judge, and for all: harmful arms with an alarm that names the harm, how long after
    the fault could act (median, range), arms with one that names harm where there is none; and the same of the healthy arms
    over seeds, but for those that even a sane rate harms by the rule.

    Args:
        rows: of faults.csv; `healthy`: of healthy.csv.
    Returns:
        rows of the columns ALARMS.
    """
    parts = {name: part for name, part in _parts(rows).items() if name != OTHERS}
    forget = {(row["model"], row["study"]) for row in rows if row["fault"] == "none" and row["label"]}
    spared = [row for row in healthy if (row["model"], row["text"]) not in forget]
    over_seeds = _of_models(spared) | {ALL: spared}
    return [(name, *_raised(part), *_falsely(over_seeds.get(name, []), "alarms")) for name, part in parts.items()]


def _parts(rows: Sequence[Row]) -> dict[str, list[Row]]:
    looked_at = [row for row in rows if int(row["seed"]) in LOOKED_AT.get(row["model"], LOOKED_AT_OTHERWISE)]
    judging = [row for row in rows if row not in looked_at]
    parts = _of_models(judging) | {ALL: judging, OTHERS: looked_at}
    return {name: part for name, part in parts.items() if part}


def _of_models(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {name: [row for row in rows if row["model"] == model] for model, name in NAMES.items()}


def _answers(rows: Sequence[Row]) -> Iterator[str]:
    harmful = [_mistake(row) for row in rows if row["label"]]
    healthy = [row for row in rows if not row["label"] and not row["open"]]
    accused = sum(bool(row["wrong"]) for row in rows if not row["label"])  # of open ones, too
    yield from (str(len(harmful)), *(str(harmful.count(how)) for how in MISTAKES))
    yield at_most(len(harmful) - harmful.count(""), len(harmful))
    yield from (str(len(healthy)), str(accused), at_most(accused, len(healthy)))
    yield str(sum(row["found"] == "not shown" for row in healthy))
    yield str(len(rows) - len(harmful) - len(healthy))


def _mistake(row: Row) -> str:
    """One of MISTAKES or ""; where another cause was named for a harmful one, that is the mistake, and not that it was ruled
    out, too."""
    made = [wrong.partition(":")[0] for wrong in row["wrong"].split()]
    return max(made, key=MISTAKES.index, default="")


def _raised(rows: Sequence[Row]) -> Iterator[str]:
    trained = [row for row in rows if row["found"] != "refused"]
    harmful = [row for row in trained if row["label"]]
    delays = [int(row["alarm_delay"]) for row in harmful if row["alarm_delay"]]
    yield from (str(len(harmful)), str(len(delays)), at_least(len(delays), len(harmful)))
    yield f"{median(delays):g} ({min(delays)} to {max(delays)})" if delays else "-"
    yield from _falsely(trained)


def _falsely(rows: Sequence[Row], column: str = "false_alarms") -> Iterator[str]:
    falsely = sum(bool(row[column]) for row in rows)
    yield from (str(len(rows)), str(falsely), at_most(falsely, len(rows)))


def at_most(count: int, total: int) -> str:
    """The upper end of the exact 95 % interval (Clopper-Pearson) of a share, in per cent."""
    return f"{100 * float(beta.ppf(0.975, count + 1, total - count)):.0f} %" if count < total else "100 %"


def at_least(count: int, total: int) -> str:
    """The lower end of the same."""
    return f"{100 * float(beta.ppf(0.025, count, total - count + 1)):.0f} %" if count else "0 %"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as documents have it."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_csv(file: Path) -> list[dict[str, str]]:
    """Its rows."""
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def write_csv(file: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A line for each."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([columns, *rows])
