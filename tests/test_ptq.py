"""Arms that are made by calibration alone: beside trained ones, and `qatrun ptq`, which trains nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from builders import tiny_llama
from studies import checksums, read
from tiny_world import begun, run_qatrun, write_world
from worlds import cli_in_world

import qatrun
from qatrun.evaluate.scores import Scores
from qatrun.quant import make_plan
from qatrun.recipe import QatConfig, calibrated_alone, load_recipe, parse_recipe
from qatrun.study.remedies import remedies

PTQ = "arms.p={method: ptq}"
SMOOTHED = "arms.s={method: ptq, qat: {format: int8, calibration: {input: mse, smooth: 0.5, sequences: 16}}}"


def test_a_calibrated_arm_stands_beside_trained_ones(world: Path) -> None:
    study = world / "runs/tiny"
    trained = ("bf16/", "hif8/", "trunk")
    before = {name: digest for name, digest in checksums(study).items() if name.startswith(trained)}
    before = {name: digest for name, digest in before.items() if not name.endswith("README.md")}  # which has the recipe
    options = ("train", "tiny.yaml", "--resume", "--set", PTQ, "--set", SMOOTHED, "--set", "export=[hif8]")
    options = (*options, "--set", "arms.s.export=[compressed-tensors]")
    ran = run_qatrun(*options, cwd=world)
    assert ran.code == 0, ran.err
    assert not begun(ran.out)
    # Made from the twin as it was trained: its plain weights are the twin's, bit for bit, smoothed or not.
    results = {arm: read(study / arm / "result.json") for arm in ("bf16", "p", "s")}
    assert results["p"]["made_from"] == results["bf16"]["weights"]
    assert results["p"]["match"] == results["bf16"]["match"]
    assert results["p"]["weights"]["model.safetensors"] == results["bf16"]["weights"]["model.safetensors"]
    assert results["s"]["weights"]["model.safetensors"] != results["bf16"]["weights"]["model.safetensors"]
    # Compared with what it was made from.
    comparison = read(study / "comparison.json")
    pairs = {pair["arm"]: pair for pair in comparison["pairs"]}
    assert {name: (pair["twin"], pair["method"]) for name, pair in pairs.items()} == {
        "hif8": ("bf16", "qat"),
        "p": ("bf16", "ptq"),
        "s": ("bf16", "ptq"),
    }
    assert "calibration: p " in (study / "comparison.txt").read_text(encoding="utf-8")
    # Whether training beats it: of the same formats alone, on terminal, in JSON, CSV and on the page.
    (against,) = comparison["over_ptq"]
    assert (against["qat"], against["ptq"], against["formats"]) == ("hif8", "p", "hif8")
    (row,) = csv.DictReader((study / "qat_ptq.csv").open(encoding="utf-8"))
    assert float(row["accuracy_pp"]) == against["accuracy_pp"]
    line = f"QAT against PTQ, hif8: {against['answer']}: hif8 against p "
    assert line in " ".join(ran.out.split())
    assert line in " ".join(run_qatrun("compare", "--study", "tiny", cwd=world).out.split())
    assert 'id="over-ptq"' in (study / "report.html").read_text(encoding="utf-8")
    (shown,) = csv.DictReader((study / "report/qat-against-ptq.csv").open(encoding="utf-8"))
    assert (shown["QAT arm"], shown["PTQ arm"], float(shown["accuracy pp"])) == ("hif8", "p", against["accuracy_pp"])
    ours, theirs = (Scores.load(study / arm / "eval").tasks for arm in ("hif8", "p"))
    items = sum(task.num_items for task in ours.values())
    difference = sum(int(ours[name].items.correct.sum()) - int(theirs[name].items.correct.sum()) for name in ours)
    assert against["accuracy_pp"] == pytest.approx(100 * difference / items)
    # Diagnosed: nothing stale, nothing clipped while it trained; what its twin forgot is asked of it, too.
    diagnosis = read(study / "diagnosis.json")["arms"]
    assert set(diagnosis["p"]["causes"]) == {"input", "forgetting", "resolution"}
    assert {effect["name"] for effect in diagnosis["p"]["effects"]} == {"training", "whole", "forgetting"}
    assert all(tensor["sqnr_db"] is not None for tensor in diagnosis["p"]["worst_tensors"])
    assert (study / "p/hif8/export.json").is_file()
    # The trained arms are as they were.
    assert before.items() <= checksums(study).items()
    again = run_qatrun(*options, cwd=world)
    assert "p: done already" in again.out
    assert "calibrating" not in again.out


def test_a_diagnosis_takes_the_scores_of_a_calibrated_arm(world: Path) -> None:
    study = world / "runs/tiny"
    assert run_qatrun("train", "tiny.yaml", "--resume", "--set", PTQ, cwd=world).code == 0
    before = read(study / "diagnosis.json")["arms"]["hif8"]
    (ptq,) = (file.parent for file in study.glob("bf16/eval-calibrated-*/items.parquet"))
    for file in ptq.glob("*.*"):
        file.unlink()
    ran = run_qatrun("diagnose", "tiny", cwd=world)
    assert ran.code == 0, ran.err
    assert "bf16 quantized after training" not in ran.err
    assert not list(ptq.glob("*.*"))
    assert read(study / "diagnosis.json")["arms"]["hif8"] == before  # the same model, answer by answer


def test_a_recipe_by_calibration_alone(tmp_path: Path) -> None:
    write_world(tmp_path)
    options = ("ptq", "tiny.yaml", "--set", "arms.late.qat.start_step=20", "--set", "arms.int8.qat.format=int8")
    ran = run_qatrun(*options, cwd=tmp_path)
    assert ran.code == 0, ran.err
    study = tmp_path / "runs/tiny-ptq"
    assert {file.parent.name for file in study.glob("*/result.json")} == {"start", "hif8", "int8"}
    assert not list(study.glob("*/checkpoints"))
    comparison = read(study / "comparison.json")
    assert [(pair["arm"], pair["twin"]) for pair in comparison["pairs"]] == [("hif8", "start"), ("int8", "start")]
    task = comparison["pairs"][0]["comparison"]["tasks"][0]
    start = Scores.load(study / "start/eval").tasks["likes.yaml"].accuracy
    assert (task["start"], task["twin"]) == (start, start)
    assert "training:" not in (study / "comparison.txt").read_text(encoding="utf-8")
    assert set(comparison["pairs"][0]["perplexity"]) == {"start", "twin", "arm"}
    diagnosis = read(study / "diagnosis.json")["arms"]["int8"]
    assert set(diagnosis["causes"]) == {"input", "resolution"}
    assert "forg" not in diagnosis["sentence"]
    assert "against the start model" not in diagnosis["sentence"]
    # What was scored is what is saved.
    model, _ = qatrun.load(study / "int8")
    assert not torch.isnan(model(torch.tensor([[3, 4, 5]])).logits).any()
    refused = run_qatrun(*options, cwd=tmp_path)
    assert refused.code == 2
    assert "holds a study that is finished" in refused.err
    # Two processes, which score together, make the same.
    both = cli_in_world(2, *options, "--set", "name=two", cwd=tmp_path)
    assert both.codes() == [0, 0], both.log()
    of_two = tmp_path / "runs/two-ptq"
    for arm in ("hif8", "int8"):
        assert read(of_two / arm / "result.json")["weights"] == read(study / arm / "result.json")["weights"]
    assert read(of_two / "comparison.json")["verdict"] == comparison["verdict"]


def test_an_arm_is_made_again_where_its_twin_was(world: Path) -> None:
    study = world / "runs/tiny"
    assert run_qatrun("train", "tiny.yaml", "--resume", "--set", PTQ, cwd=world).code == 0
    record = read(study / "p/result.json")
    text = (study / "p/result.json").read_text(encoding="utf-8")
    checksum = record["made_from"]["model.safetensors"]
    head, _, tail = text.rpartition(checksum)
    (study / "p/result.json").write_text(f"{head}{'0' * 64}{tail}", encoding="utf-8")
    ran = run_qatrun("train", "tiny.yaml", "--resume", "--set", PTQ, cwd=world)
    assert "p: made again, because bf16 was" in ran.out + ran.err
    assert read(study / "p/result.json")["weights"] == record["weights"]


def test_arms_that_calibration_makes_alike_are_made_once() -> None:
    arms = {
        "bf16": {"qat": None},
        "wide": {"qat": {"scaling": {"window": 128}}},
        "latest": {"train": {"learning_rate": 1e-3}, "qat": {"scaling": {"algorithm": "most_recent"}}},
        "rounded": {"qat": {"scaling": {"rounding": "power_of_two"}}},
        "token": {"qat": {"input": {"granularity": "per_token"}}},
    }
    recipe = parse_recipe(
        {
            "name": "r",
            "model": {"path": "m"},
            "data": {"train": {"path": "t"}},
            "train": {"steps": 1000, "seeds": [0, 1]},
            "arms": arms,
            "eval": {"tasks": {"arc_challenge": 0}},
            "contrasts": {"one": ["wide", "bf16"], "two": ["wide", "token"]},
        }
    )
    alone = calibrated_alone(recipe)
    assert (alone.name, alone.arm_names) == ("r-ptq", ("wide", "rounded", "token"))
    assert alone.train.seeds is None
    assert list(alone.contrasts) == ["two"]
    assert {arm.twin for arm in alone.arm_by_name.values()} == {"start"}


def test_check_says_what_is_calibrated_and_what_cannot_be_smoothed(tmp_path: Path) -> None:
    write_world(tmp_path)
    ran = run_qatrun("check", "tiny.yaml", "--set", SMOOTHED, "--set", "arms.s.twin=start", cwd=tmp_path)
    assert ran.code == 0, ran.err
    shown = " ".join(ran.out.split())
    assert (
        "no step is trained calibration of the start model: 16 sequences of 16 tokens, scales by the least mean"
        in shown
    )
    left = "model.layers.*.self_attn.o_proj (what makes their input cannot be scaled)"
    assert f"inputs of 12 of 14 linears smoothed by 0.5; not: {left}" in shown


def test_a_recipe_that_trains_nothing_needs_no_steps(tmp_path: Path) -> None:
    write_world(tmp_path)
    text = (tmp_path / "tiny.yaml").read_text(encoding="utf-8").replace("steps: 40", "steps: 0")
    (tmp_path / "tiny.yaml").write_text(
        text.replace("  bf16: {qat: null}\n  hif8: {}", "  hif8: {method: ptq}"), encoding="utf-8"
    )
    (arm,) = load_recipe(tmp_path / "tiny.yaml").arm_by_name.values()
    assert (arm.twin, arm.trains, arm.switch_step) == ("start", False, None)


def test_what_is_tried_first_where_the_grid_of_a_calibrated_arm_is_too_coarse() -> None:
    recipe = {"name": "r", "model": {"path": "m"}, "data": {"train": {"path": "t"}}, "train": {"steps": 0}}
    recipe |= {"method": "ptq", "qat": {"format": "int8"}, "eval": {"tasks": {"arc_challenge": 0}}}
    fitted = {"calibration": {"input": "mse", "smooth": 0.5}}
    arms = parse_recipe(recipe | {"arms": {"p": {}, "fitted": {"qat": fitted}}}).arm_by_name
    plan = make_plan(tiny_llama(), QatConfig(format="int8"))
    first, *others = remedies("resolution", arms["p"], plan, [])
    assert first.overrides == {"qat": fitted}
    assert [each.text for each in remedies("resolution", arms["fitted"], plan, [])] == [each.text for each in others]
