"""What is drawn: numbers never cut, names printed as they are, one line a step where nobody watches."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console, RenderableType

from qatrun.records.comparison import Pair
from qatrun.records.dryrun import DryRun
from qatrun.records.scores import ScoredModel
from qatrun.report import (
    TerminalDisplay,
    comparison_table,
    comparison_text,
    dry_run,
    score_table,
)

HOSTILE = "[red]x[/b] :100:"
TASK: dict[str, Any] = {
    "task": "demo_facts",
    "metric": "acc",
    "num_fewshot": 0,
    "num_items": 12_345,
    "start": 0.7512,
    "twin": 0.7625,
    "arm": 0.7488,
    "arm_off": 0.7525,
    "drop_pp": 1.37,
    "drop_relative_percent": -11.8,
    "ci95_pp": [-10.21, 10.55],
    "mcnemar_p": 1.2e-10,
    "flips_to_wrong": 123,
    "flips_to_right": 104,
    "mean_abs_delta_loglikelihood": 0.1234,
    "detectable_drop_pp": 1.23,
    "budget_pp": 1.5,
    "verdict": "inconclusive",
    "items_to_settle": 123_456,
}
ROW = {"step": 1, "phase": "qat", "loss": 2.5, "learning_rate": 1e-4, "tokens_per_second": 123456.7, "num_saturated": 3}


def a_pair(*tasks: dict[str, Any], arm: str = "hif8", twin: str = "bf16", **fields: Any) -> Pair:
    verdict = "inconclusive"
    empty: dict[str, Any] = {"loss_ape_percent": {}, "perplexity": {}, "cost": {}, "sizes": {}, "coverage": None}
    comparison = {"tasks": list(tasks) or [TASK], "verdict": verdict, "conditional_on": "these checkpoints"}
    return Pair.model_validate(
        {"arm": arm, "twin": twin, "comparison": comparison, "mismatches": [], **empty, **fields}
    )


def drawn(renderable: RenderableType, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue().splitlines()


def test_comparison_of_the_demo_fits_80_columns() -> None:
    names = ("demo_facts", "demo_routines", "demo_inference")
    lines = drawn(comparison_table(a_pair(*({**TASK, "task": name} for name in names))))
    assert [line.rstrip() for line in lines[:6]] == [
        "verdict: inconclusive -- conditional on these checkpoints",
        "",
        "hif8 against bf16",
        "task           start  bf16  hif8   off drop pp     95% interval verdict",
        "demo_facts     75.12 76.25 74.88 75.25   +1.37 -10.21 .. +10.55 inconclusive",
        "demo_routines  75.12 76.25 74.88 75.25   +1.37 -10.21 .. +10.55 inconclusive",
    ]
    assert [line.rstrip() for line in lines[8:10]] == [
        "task            items    rel.       p     flips |Δll| detects budget to settle",
        "demo_facts     12,345 -11.80% 1.2e-10 123↓ 104↑ 0.123    1.23    1.5  ~123,456",
    ]
    assert max(map(len, lines)) <= 80


def test_what_is_not_known_is_a_dash_and_a_column_less() -> None:
    task = {**TASK, "start": None, "arm_off": None, "drop_relative_percent": None, "items_to_settle": None}
    lines = drawn(comparison_table(a_pair(task)))
    assert "off" not in lines[3].split()
    assert lines[4].split()[:4] == ["demo_facts", "-", "76.25", "74.88"]
    assert lines[7].split()[2] == "-"
    assert lines[7].split()[-1] == "-"


@pytest.mark.parametrize("width", [80, 100])
def test_long_names_are_folded_and_numbers_never_cut(width: int) -> None:
    pair = a_pair(
        {**TASK, "task": "tasks/of/mine/with-a-long-name.yaml"}, arm="hif8-window-64-most-recent", twin="bf16-3e-5"
    )
    lines = drawn(comparison_table(pair), width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert "…" not in text
    for number in ("75.12", "76.25", "74.88", "75.25", "+1.37", "-10.21 .. +10.55", "inconclusive", "~123,456"):
        assert number in text


def test_everything_known_is_below_the_tables() -> None:
    pair = a_pair(
        perplexity={"start": 12.0, "twin": 10.0, "arm": 10.5, "arm_off": 10.25},
        loss_ape_percent={"all_steps": 0.1, "after_switch": 0.2},
        cost={
            "twin": {"seconds": 61.2, "peak_memory_bytes": 2**30},
            "arm": {"seconds": 75.0, "peak_memory_bytes": 2**31},
        },
        sizes={"plain_bytes": 3 * 2**20, "quantized_bytes": 2 * 2**20},
        coverage="14 of 15 linears",
        mismatches=["seed -- the twin has 0, the arm 1"],
    )
    lines = drawn(comparison_table(pair), 120)
    assert lines[0] == "verdict: inconclusive -- conditional on these checkpoints"
    assert lines[9:] == [
        "scored: demo_facts 0-shot acc",
        "held-out perplexity: start 12.000, bf16 10.000, hif8 10.500, hif8 quantizers off 10.250",
        "training loss APE: 0.100% all steps, 0.200% after the switch",
        "training: bf16 61 s and 1.00 GiB at most, hif8 75 s and 2.00 GiB at most",
        "14 of 15 linears; weights on disk: plain 3.0 MiB, quantized 2.0 MiB",
        "compared anyway, although: seed -- the twin has 0, the arm 1",
    ]


def test_text_for_a_file_holds_no_control_characters() -> None:
    text = comparison_text([a_pair(), a_pair(arm="int8")])
    assert "hif8 against bf16" in text
    assert "int8 against bf16" in text
    assert all(character.isprintable() or character == "\n" for character in text)


def test_names_are_printed_as_they_are() -> None:
    scored = {"name": HOSTILE, "num_fewshot": 0, "metric": HOSTILE, "num_items": 9, "accuracy": 0.5, "stderr": None}
    screens = {
        "comparison": comparison_table(
            a_pair({**TASK, "task": HOSTILE}, arm=HOSTILE, twin=HOSTILE, mismatches=[HOSTILE])
        ),
        "scores": score_table(a_model({**scored, "num_truncated": 2})),
        "dry run": dry_run(a_dry_run(name=HOSTILE, model=HOSTILE, folder=HOSTILE)),
    }
    assert {name: "\n".join(drawn(screen, 200)).count(HOSTILE) for name, screen in screens.items()} == {
        "comparison": 8,  # title and header twice each, each table once, scored, compared anyway
        "scores": 4,
        "dry run": 6,
    }


def a_model(task: dict[str, Any], name: str = HOSTILE) -> ScoredModel:
    return ScoredModel.model_validate({"model": name, "settings": {}, "tasks": [task], "output": None})


def a_dry_run(**fields: Any) -> DryRun:
    text = fields["name"] if fields else "x"
    arm = {
        "name": text,
        "twin": text,
        "steps": 8,
        "warmup_steps": 2,
        "switch_step": 3,
        "learning_rate": 1e-3,
        "tokens_per_step": 1024,
        "tokens": 8192,
        "coverage": None,
        "roles": [],
        "memory_bytes": None,
    }
    task = {
        "name": text,
        "num_fewshot": 0,
        "metric": "acc",
        "num_items": None,
        "source": "hub: x",
        "budget_pp": 1.0,
        "detectable_drop_pp": None,
        "missing": None,
    }
    plan = {
        "seeds": None,
        "runs_on": "a CPU",
        "num_parameters": None,
        "arms": [arm],
        "disk_bytes": None,
        "tasks": [task],
        "assumed_discordance": 0.05,
        "problems": [],
    }
    return DryRun.model_validate({"name": "x", "model": "x", "folder": "x", **plan, **fields})


def played(console: Console) -> str:
    """A short study on a display."""
    with TerminalDisplay(console) as display:
        display.begin_scoring(HOSTILE)
        display.on_scored(HOSTILE, 4, 8)
        display.begin_training("hif8", 20, 60)
        for step in range(21, 61):
            display.on_step({**ROW, "step": step})
        display.on_warning(HOSTILE)
        display.note(HOSTILE)
        if display.live:
            display._progress.refresh()
    return console.file.getvalue()


def test_in_a_log_ten_lines_a_segment() -> None:
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    steps = [
        f"00:00:00 training hif8 step {step} of 60: qat  loss 2.5000  lr 1.0e-04  123,457 tok/s  saturated 3"
        for step in range(24, 61, 4)
    ]
    assert re.sub(r"\d\d:\d\d:\d\d", "00:00:00", played(console)).splitlines() == [
        f"00:00:00 scoring {HOSTILE}",
        "00:00:00 training hif8",
        *steps,
        f"warning: {HOSTILE}",
        HOSTILE,
    ]


def test_in_a_log_nothing_is_silent_for_longer_than_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    console, clock = Console(file=io.StringIO(), width=80, soft_wrap=True), [0.0]
    monkeypatch.setattr("qatrun.report.live.time.monotonic", lambda: clock[0])
    with TerminalDisplay(console) as display:
        display.begin_reading("what the start model knows")
        display.begin_scoring("start model")
        for done in range(1, 9):
            clock[0] += 25
            display.on_scored("mmlu", done, 8000)
        display.begin_training("hif8", 0, 1000)
        for step in range(1, 9):
            clock[0] += 25
            display.on_step({**ROW, "step": step})
    assert [line.split(": qat")[0][9:] for line in console.file.getvalue().splitlines()] == [
        "reading what the start model knows",
        "scoring start model",
        "scoring start model: mmlu 3 of 8,000",
        "scoring start model: mmlu 6 of 8,000",
        "training hif8",
        "training hif8 step 3 of 1000",
        "training hif8 step 6 of 1000",
    ]


def test_on_a_terminal_bar_and_detail_fit_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    display = TerminalDisplay(console)
    display.begin_training("hif8-window-64-most-recent-and-more", 0, 10_000)
    display.on_step({**ROW, "step": 1234})
    what, bar, detail = drawn(display._progress)
    assert what.strip() == "training hif8-window-64-most-recent-and-more"
    assert "1234/10000" in bar
    assert bar.split("ETA ")[1].count(":") == 2
    assert detail.strip() == "qat  loss 2.5000  lr 1.0e-04  123,457 tok/s  saturated 3"
    assert len(bar) <= 80


def test_on_a_terminal_names_are_printed_as_they_are() -> None:
    shown = played(Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None))
    assert shown.count(HOSTILE) >= 3
