"""From start to what ships: the ranking, its colours, its tables for a paper, and how far a study is."""

from __future__ import annotations

from typing import Any

import pytest
from test_report import TASK, a_pair, drawn

from qatrun.records.diagnosis import ArmDiagnosis, Cause
from qatrun.records.training import AlarmRow
from qatrun.report.markup import latex, markdown
from qatrun.report.overview import overview
from qatrun.report.stages import Pace, Stage, clock_time
from qatrun.report.total import Total, marked_up, tiles, totals

SETTLED = {**TASK, "verdict": "within"}


def one(verdict: str = "within", *, alarms: int = 0, causes: dict[str, str] | None = None, **fields: Any) -> Total:
    pair = a_pair(SETTLED, **fields)
    pair = pair.model_copy(update={"comparison": pair.comparison.model_copy(update={"verdict": verdict})})
    found = {
        name: Cause(answer=answer, could_hide=0.171, unit="nats a token") for name, answer in (causes or {}).items()
    }
    diagnosis = ArmDiagnosis(
        sentence="", findings=[name for name, answer in (causes or {}).items() if answer == "found"], causes=found
    )
    return totals(
        [pair],
        {pair.arm: diagnosis} if causes else {},
        {pair.arm: [{"step": step, "kind": "resolution", "text": "low"} for step in range(alarms)]},
    )[0]


@pytest.mark.parametrize(
    ("total", "state", "next_step"),
    [
        (one(causes={"forgetting": "ruled out"}), "good", "ship it"),
        (one(), "good", "`qatrun diagnose` says whether anything hides"),
        (one(causes={"forgetting": "not shown"}), "warn", "harm was not ruled out"),
        (one(alarms=1), "warn", "look at the alarms"),
        (one("inconclusive"), "warn", "more evidence"),
        (one("exceeds"), "bad", "a drop exceeds its budget"),
        (one(causes={"forgetting": "found"}), "bad", "forgetting: `qatrun fix`"),
    ],
)
def test_nothing_is_green_that_was_not_shown(total: Total, state: str, next_step: str) -> None:
    assert total.state == state
    assert total.next_step.startswith(next_step)


def test_an_alarm_of_the_trunk_counts_once() -> None:
    pair, row = a_pair(SETTLED), AlarmRow(step=40, kind="forgetting", text="the loss has risen")
    assert totals([pair], {}, {pair.arm: [row], pair.twin: [row]})[0].answer.endswith("1 alarm")


def test_what_could_hide_is_said_with_how_much() -> None:
    lines = "\n".join(drawn(overview([one(alarms=2, causes={"forgetting": "not shown"})]), 120))
    assert "hif8: not shown: forgetting (up to 0.17 nats a token could hide)" in lines
    assert "within, 2 alarms" in lines


def test_arms_are_ranked_by_verdict_then_by_what_ships() -> None:
    worse = {**SETTLED, "arm": 0.70}
    pairs = [a_pair(SETTLED, arm="a"), a_pair(worse, arm="b"), a_pair(SETTLED, arm="c")]
    verdicts = ("exceeds", "within", "within")
    judged = [
        pair.model_copy(update={"comparison": pair.comparison.model_copy(update={"verdict": verdict})})
        for pair, verdict in zip(pairs, verdicts, strict=True)
    ]
    assert [total.pair.arm for total in totals(judged, {}, {})] == ["c", "b", "a"]


def test_the_whole_way_is_the_sum_of_its_parts() -> None:
    total = one(sizes={"plain_bytes": 2048, "quantized_bytes": 1024})
    assert total.training_pp is not None
    assert total.lost_pp == pytest.approx(total.training_pp + total.quantization_pp)
    assert total.quantization_pp == pytest.approx(100 * (TASK["twin"] - TASK["arm"]))
    assert [what for what, *_ in tiles(total)] == ["accuracy", "perplexity", "size", "budget", "next"]


@pytest.mark.parametrize("width", [120, 80, 65, 40])
def test_no_number_of_the_overview_is_cut(width: int) -> None:
    lines = drawn(overview([one(alarms=1)]), width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "75.12 → 74.88 %" in text
    assert "+0.24" in text


def test_a_metric_that_decides_nothing_is_shown_beside_the_one_that_does() -> None:
    task = {**SETTLED, "metric": "acc_norm", "others": {"acc": {"start": 0.5, "twin": 0.4, "arm": 0.3}}}
    text = marked_up(totals([a_pair(task)], {}, {}), "markdown")
    assert "| acc_norm * |" in text
    assert "| acc |  | 50.00 | 40.00 | 30.00 |" in text


def test_tables_for_a_paper_escape_what_their_language_would_read() -> None:
    columns, rows = ("arm", "drop"), [("a_b|c & 5 %", "-0.25"), ("\\evil{}", "+1.00")]
    assert markdown(columns, rows).splitlines() == [
        "| arm | drop |",
        "| --- | ---: |",
        "| a_b\\|c & 5 % | -0.25 |",
        "| \\evil{} | +1.00 |",
    ]
    assert latex(columns, rows).splitlines()[4:6] == [
        r"a\_b|c \& 5 \% & $-$0.25 \\",
        r"\textbackslash{}evil\{\} & +1.00 \\",
    ]


def test_how_long_a_study_will_take_follows_from_what_was_done() -> None:
    now = 0.0
    stages = [Stage("scoring", "start", 1), Stage("training", "trunk", 100), Stage("scoring", "bf16", 1)]
    pace = Pace(stages, lambda: now)
    assert (pace.place, pace.seconds_left) == ("", None)
    pace.begin("scoring", "start")
    assert (pace.place, pace.seconds_left) == ("1 of 3", None)
    now = 30.0
    pace.begin("training", "trunk")
    now = 40.0
    pace.advance(20)
    assert pace.seconds_left == pytest.approx(80 * 0.5 + 30)
    now = 80.0
    pace.begin("scoring", "bf16")
    assert pace.place == "3 of 3"
    assert pace.seconds_left == pytest.approx(30)


def test_stages_that_a_resume_leaves_out_are_passed_over() -> None:
    pace = Pace([Stage("training", name, 10) for name in ("a", "b", "c")], lambda: 0.0)
    pace.begin("training", "c")
    assert pace.place == "3 of 3"
    pace.begin("training", "unheard of")
    assert pace.place == "3 of 3"
    assert [clock_time(seconds) for seconds in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]
