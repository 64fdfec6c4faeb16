"""`qatrun advise`: the rule on intervals, and the verb from a model and from a recipe to a recipe that can be run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_world import run_qatrun, write_world

from qatrun.recipe import load_recipe
from qatrun.records.advice import Candidate
from qatrun.records.sensitivity import GroupCost, MeasuredCost, Sensitivity
from qatrun.study.deciding import decide, in_order, tokens_needed, verdict_of, worth_keeping
from qatrun.study.keeping import parse_budget

BUDGET = 0.01


def candidate(name: str, low: float, high: float, **more: Any) -> Candidate:
    values: dict[str, Any] = {"format": "int8", "weight": "per_tensor", "input": "per_tensor", "calibration": {}}
    values |= {"weight_bytes": 1, "nats": (low + high) / 2, "ci95": [low, high], "runs": None, "why": ""}
    return Candidate(name=name, verdict=verdict_of((low, high), BUDGET), **(values | more))


WITHIN, BETTER = candidate("within", 0.004, 0.009), candidate("better", 0.003, 0.0099)
BETWEEN, ABOVE = candidate("between", 0.001, 0.02), candidate("above", 0.0101, 0.03)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([ABOVE, BETWEEN, WITHIN, BETTER], ("better", "ptq")),
        ([ABOVE, BETWEEN], ("between", "not known")),
        ([ABOVE, candidate("worse", 0.5, 0.7)], ("above", "qat")),
        ([candidate("at it", 0.005, BUDGET)], ("at it", "ptq")),
        ([candidate("from it", BUDGET, 0.02)], ("from it", "not known")),
        ([ABOVE, candidate("kept", 0.004, 0.009, kept=["q"])], ("kept", "ptq with some kept")),
        ([ABOVE, candidate("kept", 0.004, 0.011, kept=["q"])], ("kept", "not known")),
        ([ABOVE, candidate("kept", 0.011, 0.012, kept=["q"])], ("kept", "qat")),
        ([ABOVE, candidate("falls back", 0, 0.001, runs="as weight-only")], ("above", "qat")),
    ],
)
def test_the_whole_interval_decides(given: list[Candidate], expected: tuple[str, str]) -> None:
    best, way = decide(given)
    assert (best.name, way) == expected


def test_what_the_hardware_does_not_run_is_not_advised_and_stands_below() -> None:
    runs = candidate("runs", 0.02, 0.03, runs="natively")
    falls_back, odd = candidate("falls back", 0.0, 0.001, runs="as weight-only"), candidate("odd", 0, 0, nats=None)
    assert not falls_back.is_advisable
    assert [each.name for each in in_order([odd, falls_back, runs])] == ["runs", "falls back", "odd"]


@pytest.mark.parametrize(
    ("shares", "flat", "linears", "said"),
    [
        ([0.1, 0.1], False, ("g0", "g1"), "g0 and g1, 20 % of the weights, lose most of it"),
        (
            [0.2, 0.1],
            False,
            (),
            "30 % of the weights would have to stay in BF16, more than a quarter is not tried",
        ),
        ([0.1], True, (), "no few do: nothing is worth keeping in BF16"),
        ([], False, (), "no few do: nothing is worth keeping in BF16"),
    ],
)
def test_few_linears_that_carry_the_loss_are_worth_keeping(
    shares: list[float], flat: bool, linears: tuple[str, ...], said: str
) -> None:
    own = {"num_weights": 1, "nats": 1.0, "sqnr_db": None, "bits": 1.0}
    groups = [
        GroupCost(name=f"g{n}", linears=[f"g{n}"], share=share, kept=n < len(shares), **own)
        for n, share in enumerate([*shares, 0.5])
    ]
    cost = MeasuredCost(nats=1.0, nats_ci95=None, perplexity_percent=1.0, perplexity_ci95_percent=None)
    found = Sensitivity(
        recipe="",
        arm="",
        formats=[],
        method="one backward",
        num_tokens=(1, 1),
        budget=parse_budget("1%"),
        sum_of_parts=1.0,
        all_quantized=1.0,
        groups=groups,
        curve=[],
        everything=cost,
        choice=cost,
        flat=flat,
        answer="",
        fragment=None,
    )
    assert worth_keeping(found) == (linears, said)


def test_the_text_that_would_settle_it_shrinks_the_interval_to_the_distance() -> None:
    assert tokens_needed(candidate("x", 0.004, 0.012), BUDGET, 1000) == 4000  # 0.004 each way, 0.002 from the budget
    assert tokens_needed(candidate("x", 0.0, 2 * BUDGET), BUDGET, 1000) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advise")
    write_world(folder)
    return folder


FEW = ("--set=qat.calibration={sequences: 4}", "--set=data.valid_sequences=8")


def advice(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "advice.json").read_text())
    return found


def test_calibration_is_enough_for_a_loose_budget_and_nothing_is_measured_twice(world: Path) -> None:
    asked = ("advise", "tiny.yaml", *FEW, "--output=loose")
    ran = run_qatrun(*asked, "--budget=5", "--hardware=h100", cwd=world)
    assert ran.code == 0, ran.err
    found = advice(world / "loose")
    assert found["way"] == "ptq"
    assert {each["runs"] for each in found["candidates"] if each["format"] == "hif8"} == {"not at all"}
    first = found["candidates"][0]
    assert (first["name"], first["runs"]) == (found["advised"], "natively")
    assert first["ci95"][0] < first["nats"] < first["ci95"][1] < 5
    assert "calibration is enough" in ran.out
    assert "not at all" in ran.out
    assert "<html" in (world / "loose/report.html").read_text()
    recipe = load_recipe(world / "loose/advised.yaml")
    assert [(arm.method, arm.twin) for arm in recipe.arm_by_name.values()] == [("ptq", "start")]
    assert recipe.target.hardware == "h100"
    assert recipe.budget["perplexity"] == pytest.approx(100 * math.expm1(5), rel=1e-3)
    checked = run_qatrun("check", "loose/advised.yaml", cwd=world)
    assert checked.code == 0, checked.err
    rows = (world / "loose/measured.jsonl").read_bytes()
    ascend = run_qatrun(*asked, "--budget=0.0000001", "--hardware=ascend-950", cwd=world)
    assert ascend.code == 0, ascend.err
    assert advice(world / "loose")["way"] in ("qat", "not known")
    assert (world / "loose/measured.jsonl").read_bytes() == rows


def test_a_model_with_a_text_needs_no_recipe(world: Path) -> None:
    ran = run_qatrun("advise", "model", "--data=text.jsonl", "--set=eval.tasks={likes.yaml: 0}", *FEW, cwd=world)
    assert ran.code == 0, ran.err
    recipe = load_recipe(world / "runs/model-advice/advised.yaml")
    assert (recipe.model.path, recipe.data.train.path) == ("model", "text.jsonl")


MISTAKES = {
    ("model",): "model is no recipe; a model needs a text to be measured on: --data PATH",
    ("dmo",): "dmo is no recipe (did you mean 'demo'?)",
    ("tiny.yaml", "--data=text.jsonl"): "--data: a recipe names its text",
    ("tiny.yaml", "--budget=9bits"): "--budget 9bits: of a loss",
    ("tiny.yaml", "--budget="): "--budget : must be nats a token (0.002)",
    ("tiny.yaml", "--budget=101"): "--budget 101: must be nats a token (0.002)",
    ("tiny.yaml", "--hardware=h10"): "--hardware h10",
    ("tiny.yaml", "--set=data.valid_sequences=1"): "data.valid_sequences -- an interval needs two sequences or more",
    ("nope", "--data=text.jsonl"): "no model folder 'nope' here",
    ("model", "--data=nope.jsonl"): "no such file 'nope.jsonl'",
    ("tiny.yaml", "--output=model"): "model holds something else",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_what_is_refused_says_so(world: Path, given: tuple[str, ...]) -> None:
    ran = run_qatrun("advise", *given, cwd=world)
    assert ran.code == 2
    assert MISTAKES[given] in ran.err
    assert "Traceback" not in ran.err
