"""`qatrun diagnose` and `qatrun report` on finished studies."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from tiny_world import run_qatrun

from qatrun.evaluate.scores import Scores
from qatrun.evaluate.text import load_texts
from qatrun.layout import ITEMS_FILE
from qatrun.train.metrics import read_metrics


def test_train_ends_with_a_diagnosis_and_the_page(trained_world: Path) -> None:
    log = (trained_world / "tiny.log").read_text(encoding="utf-8")
    diagnosis = json.loads((trained_world / "runs/tiny/diagnosis.json").read_text(encoding="utf-8"))
    assert f"diagnosis: {diagnosis['sentence']}" in " ".join(log.split())
    assert "the page: runs/tiny/report.html" in log


def test_effects_are_between_the_scores_on_disk(trained_world: Path) -> None:
    study = trained_world / "runs/tiny"
    arm = json.loads((study / "diagnosis.json").read_text(encoding="utf-8"))["arms"]["hif8"]
    calibrated = (study.glob(f"{arm}/eval-calibrated-*/{ITEMS_FILE}") for arm in ("bf16", "hif8"))
    ptq, fresh = (file.parent for (file,) in map(list, calibrated))
    places = {"start": "start/eval", "twin": "bf16/eval", "on": "hif8/eval", "off": "hif8/eval-quantizers-off"}
    places |= {"ptq": f"bf16/{ptq.name}", "fresh": f"hif8/{fresh.name}"}
    scores = {name: Scores.load(study / place) for name, place in places.items()}
    for task, accuracy in arm["accuracy"].items():
        assert accuracy == {name: found.tasks[task].accuracy for name, found in scores.items()}
        for effect in arm["tasks"][task]:
            drop = 100 * (accuracy[effect["from"]] - accuracy[effect["to"]])
            assert effect["drop_pp"] == pytest.approx(drop)
    assert set(arm["perplexity"]) == {*places, "finest"}
    for name, place in places.items():
        assert arm["perplexity"][name] == pytest.approx(math.exp(load_texts(study / place).texts["held-out"].mean))
    assert arm["worst_tensors"]
    histograms = json.loads((study / "hif8/histograms.json").read_text(encoding="utf-8"))["tensors"]
    assert all(sum(h["counts"]) + h["num_zero"] == h["num_values"] for h in histograms)


def test_a_diagnosis_is_made_again_from_what_is_scored(trained_world: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_world, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "runs/tiny/diagnosis.json").read_text(encoding="utf-8")
    (tmp_path / "runs/tiny/diagnosis.json").unlink()
    ran = run_qatrun("diagnose", "tiny", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "scoring" not in ran.err
    assert (tmp_path / "runs/tiny/diagnosis.json").read_text(encoding="utf-8") == before
    for model in ("start", "twin", "ptq", "off", "on", "fresh"):
        assert model in ran.out
    shown = run_qatrun("diagnose", "runs/tiny", "--json", cwd=tmp_path)
    assert json.loads(shown.out)["runs/tiny"] == json.loads(before)


def test_alarms_stand_beside_what_the_scores_can_tell(world: Path) -> None:
    study = world / "runs/tiny"
    rows = [
        {"step": step, "kind": kind, "text": "", "tensor": None}
        for step, kind in ((30, "saturation"), (40, "forgetting"))
    ]
    (study / "hif8/alarms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run_qatrun("diagnose", "tiny", cwd=world).code == 0
    diagnosis = json.loads((study / "diagnosis.json").read_text(encoding="utf-8"))
    assert diagnosis["arms"]["hif8"]["findings"] == []
    answers = {cause["answer"] for cause in diagnosis["arms"]["hif8"]["causes"].values()}
    known = "what they cost lies below every threshold" if answers == {"ruled out"} else "these scores cannot tell"
    assert f"; its alarms (saturation at step 30, forgetting at step 40): {known}" in diagnosis["sentence"]


def test_report_writes_the_page_of_the_newest_study(trained_world: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_world / "runs/tiny", tmp_path / "runs/tiny")
    (tmp_path / "runs/tiny/report.html").unlink()
    ran = run_qatrun("report", cwd=tmp_path)
    assert ran == (0, "wrote runs/tiny/report.html\n", "")
    assert (tmp_path / "runs/tiny/report.html").stat().st_size > 10_000


@pytest.mark.parametrize(("verb", "study"), [("diagnose", "nothing"), ("report", "nothing")])
def test_a_study_that_is_not_there(verb: str, study: str, tmp_path: Path) -> None:
    ran = run_qatrun(verb, study, cwd=tmp_path)
    assert (ran.code, ran.err) == (2, "no study 'nothing' in runs\n")
    ran = run_qatrun(verb, cwd=tmp_path)
    assert (ran.code, ran.err) == (2, "no study in runs yet\n")


def test_the_mini_benchmark_is_scored_at_each_probe(world: Path) -> None:
    settings = ("--set", "name=mini", "--set", "monitor.probe={every: 20, items: 5}", "--set", "diagnose.at_end=false")
    assert run_qatrun("train", "tiny.yaml", *settings, cwd=world).code == 0
    rows = {row["step"]: row for row in read_metrics(world / "runs/mini/hif8/metrics.jsonl") if "kl_off" in row}
    assert list(rows) == [10, 20, 40]
    assert "accuracy_on/likes.yaml" not in rows[10]
    for step in (20, 40):
        for task in ("likes.yaml", "demo_facts"):
            assert {rows[step][f"accuracy_{state}/{task}"] for state in ("on", "off")} <= {i / 5 for i in range(6)}
    assert not (world / "runs/mini/diagnosis.json").exists()
