"""The recipes that `qatrun advise` writes, to their end: with some linears kept, and for training; and what is left of an
advice that was stopped or damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import Ran, run_qatrun
from transformers import AutoModelForCausalLM, AutoTokenizer

from qatrun.evaluate.attribution import HELD_OUT, rise
from qatrun.evaluate.text import load_texts
from qatrun.layout import StudyFolder
from qatrun.recipe import load_recipe
from qatrun.study import advising, candidates
from qatrun.study.advised_recipe import KINDS
from qatrun.study.checking import preflight

BUDGET = 0.01
NAME = "int8-tensor-tensor"


@torch.no_grad()
def plant(source: Path, folder: Path, *, in_weights: bool) -> None:
    """The same function with two channels 1024 times as large, and read as much less: of what the first block's gate and
    up-projection read, or of what its down-projection reads, for which the up-projection's weights are as large."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    block = model.model.layers[0]
    mlp, norm = block.mlp, block.post_attention_layernorm
    made, readers = (mlp.up_proj.weight, [mlp.down_proj]) if in_weights else (norm.weight, [mlp.gate_proj, mlp.up_proj])
    made[:2] *= 1024
    for reader in readers:
        reader.weight[:, :2] /= 1024
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


@pytest.fixture(scope="module")
def planted(trained_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world with models `few` and `many`: INT8 with one scale ruins few of their linears, and too many to be kept."""
    folder = tmp_path_factory.mktemp("planted")
    for name in ("text.jsonl", "items.jsonl", "likes.yaml", "tiny.yaml"):
        shutil.copy(trained_world / name, folder)
    plant(trained_world / "runs/tiny/bf16", folder / "few", in_weights=False)
    plant(trained_world / "runs/tiny/bf16", folder / "many", in_weights=True)
    return folder


@pytest.fixture(autouse=True)
def one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has no cure for outliers but to leave them alone."""
    monkeypatch.setattr(advising, "KINDS", tuple(kind for kind in KINDS if kind.name == NAME))


def advise(world: Path, model: str, *options: str) -> Ran:
    few = ("--set=qat.calibration={sequences: 8}", "--set=data.valid_sequences=32")
    return run_qatrun(
        "advise", "tiny.yaml", f"--set=model.path={model}", *few, f"--budget={BUDGET}", *options, cwd=world
    )


def advice(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "advice.json").read_text())
    return found


def test_the_recipe_with_linears_kept_makes_the_model_that_was_measured(planted: Path) -> None:
    ran = advise(planted, "few", "--output=kept", "--hardware=a100")
    assert ran.code == 0, ran.err
    found = advice(planted / "kept")
    kept, everything = found["candidates"]
    assert (found["way"], found["advised"]) == ("ptq with some kept", kept["name"])
    assert (kept["name"], kept["kept"]) == (
        f"{NAME}-kept",
        [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")],
    )
    assert kept["ci95"][1] <= BUDGET < everything["ci95"][0]
    assert everything["weight_bytes"] < kept["weight_bytes"] < found["bf16_bytes"]
    assert "with 2 linears in BF16" in " ".join(ran.out.split())
    assert (planted / found["curve"] / "report.html").is_file()
    trained = run_qatrun("train", "kept/advised.yaml", cwd=planted)
    assert trained.code == 0, trained.err
    study = StudyFolder(planted / "runs/tiny-advised")
    start, arm = (load_texts(folder).texts[HELD_OUT] for folder in (study.start.eval, study.arm("int8").eval))
    assert rise(start, arm).mean == pytest.approx(kept["nats"], rel=1e-4)
    assert json.loads(study.comparison.read_text())["pairs"][0]["comparison"]["perplexity"]["verdict"] == "within"


def test_the_recipe_for_training_compares_it_with_calibration(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = advise(planted, "many", "--output=qat")
    assert ran.code == 0, ran.err
    found = advice(planted / "qat")
    assert (found["way"], found["advised"]) == ("qat", NAME)
    assert found["sensitivity"].endswith("would have to stay in BF16, more than a quarter is not tried")
    monkeypatch.chdir(planted)
    checked = preflight(load_recipe("qat/advised.yaml"))
    assert not checked.problems
    arms = checked.arms
    assert {name: (arm.method, arm.twin, arm.qat is None) for name, arm in arms.items()} == {
        "bf16": ("qat", None, True),
        "int8": ("qat", "bf16", False),
        "int8-ptq": ("ptq", "bf16", False),
    }
    # calibrated as what was measured
    row = next(row for row in map(json.loads, (planted / "qat/measured.jsonl").open()) if row["name"] == NAME)
    assert row["kept"] == []
    by_hand = load_recipe("tiny.yaml", ["model.path=many", "qat={format: int8}", "method=ptq", "arms={int8: {}}"])
    assert checked.plans["int8-ptq"] == preflight(by_hand).plans["int8"]


def test_what_was_measured_is_not_measured_again_and_what_is_damaged_is(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, calls = candidates.score_texts, []

    def stopped_at_the_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    monkeypatch.setattr(candidates, "score_texts", stopped_at_the_second)
    ran = advise(planted, "few", "--output=stopped")
    assert ran.code == 130
    assert "stopped by Ctrl-C: what is measured is saved" in ran.err
    assert "Traceback" not in ran.err
    measured = planted / "stopped/measured.jsonl"
    assert [json.loads(row)["name"] for row in measured.open()] == ["plain"]
    assert not (planted / "stopped/advised.yaml").exists()
    assert advise(planted, "few", "--output=stopped").code == 0
    whole, rows = advice(planted / "stopped"), measured.read_text()
    assert len(calls) == 2 + 2, "the plain model once"
    first, second, third = rows.splitlines(keepends=True)
    for damaged in (first + second[:50], first + "\n" + '{"name": "plain"}\n' + "\0" + second + third):
        measured.write_text(damaged)
        assert advise(planted, "few", "--output=stopped").code == 0
        assert advice(planted / "stopped") == whole
        assert sorted(measured.read_text().splitlines(keepends=True)) == sorted(rows.splitlines(keepends=True))


def test_what_other_settings_found_is_not_thrown_away_unasked(planted: Path) -> None:
    assert advise(planted, "few", "--output=other").code == 0
    for model, option, changed in (
        ("many", "--budget=1", "model.path (few -> many)"),
        ("few", "--set=data.seq_len=8", "data.seq_len (16 -> 8)"),
        ("few", "--set=qat.skip_blocks={first: 1}", "qat.skip_blocks.first (0 -> 1)"),
    ):
        ran = advise(planted, model, "--output=other", option)
        assert ran.code == 2
        assert "other holds what was found with other settings" in ran.err
        assert changed in ran.err
    (planted / "other/settings.json").write_text("{")
    assert "settings.json (damaged)" in advise(planted, "few", "--output=other").err
    assert advise(planted, "few", "--output=other", "--overwrite").code == 0
