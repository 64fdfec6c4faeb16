"""`qatrun train` from recipe to comparison: what lies where, which arms may stand beside each other, how it ends."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import pytest
import torch
from studies import SHORT, checksums, read
from tiny_world import RUINED_ARM, begun, one_thread, run_qatrun, write_world
from transformers import AutoModelForCausalLM, AutoTokenizer

import qatrun
from qatrun.evaluate.scores import Scores
from qatrun.train.metrics import read_metrics

CHECKPOINT = ("manifest.json", "model.safetensors", "optimizer.safetensors", "progress.json", "state.safetensors")
SAMPLES = ("samples/demo_facts.jsonl", "samples/likes.jsonl")
SCORES = ("items.parquet", "lm_eval_results.json", *SAMPLES, "scores.json", "text.json")
MODEL = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


# What a finished study holds.


def test_every_file_is_where_the_layout_says(trained_world: Path) -> None:
    study = trained_world / "runs/tiny"
    (trunk,) = study.glob("trunk-*")
    expected = {".lock", "recipe.yaml", "environment.json", "comparison.json", "comparison.csv", "comparison.txt"}
    expected |= {"diagnosis.json", "report.html", "start/result.json", "start/known_text.safetensors"} | {
        f"start/eval/{name}" for name in SCORES
    }
    expected |= {
        f"{trunk.name}/{name}" for name in ("metrics.jsonl", "alarms.jsonl", "probe.safetensors", "result.json")
    }
    expected |= {f"{trunk.name}/tensors/step-0000{step}.parquet" for step in ("08", "10")}  # observed over a window
    expected |= {f"{trunk.name}/checkpoints/step-0000{step}/{name}" for step in ("08", "10") for name in CHECKPOINT}
    for arm in ("bf16", "hif8"):
        own = {"README.md", "metrics.jsonl", "alarms.jsonl", "result.json", *MODEL}
        own |= {f"eval/{name}" for name in SCORES}
        own |= {f"checkpoints/step-0000{step}/{name}" for step in ("36", "40") for name in CHECKPOINT}
        expected |= {f"{arm}/{name}" for name in own}
    expected |= {f"hif8/quantized/{name}" for name in ("plan.json", *MODEL)}
    expected |= {f"hif8/eval-quantizers-off/{name}" for name in SCORES}
    expected |= {f"hif8/tensors/step-0000{step}.parquet" for step in range(12, 41, 4)} | {"hif8/histograms.json"}
    for variant in (
        f"{arm}/{place.name}" for arm in ("bf16", "hif8") for place in study.glob(f"{arm}/eval-calibrated-*")
    ):
        answered = (study / variant / "items.parquet").is_file()  # the finest scales read the text alone
        expected |= {f"{variant}/{name}" for name in (SCORES if answered else ("text.json",))}
    assert len(list(study.glob("*/eval-calibrated-*/items.parquet"))) == 2
    assert {file for file in checksums(study) if not file.startswith("report/")} == expected


def test_the_comparison_says_the_same_as_json_csv_and_text(trained_world: Path) -> None:
    study = trained_world / "runs/tiny"
    whole = read(study / "comparison.json")
    (pair,) = whole["pairs"]
    tasks = pair["comparison"]["tasks"]
    rows = list(csv.DictReader((study / "comparison.csv").open(encoding="utf-8")))
    text = (study / "comparison.txt").read_text(encoding="utf-8")
    assert " ".join(f"diagnosis: {read(study / 'diagnosis.json')['sentence']}".split()) in " ".join(text.split())
    assert whole["verdict"] == pair["comparison"]["verdict"] == "inconclusive"
    assert [(row["arm_name"], row["twin_name"], row["task"]) for row in rows] == [
        ("hif8", "bf16", task["task"]) for task in tasks
    ]
    for task, row in zip(tasks, rows, strict=True):
        numbers = {**task, "ci95_low_pp": task["ci95_pp"][0], "ci95_high_pp": task["ci95_pp"][1]}
        for column in ("start", "twin", "arm", "arm_off", "drop_pp", "ci95_low_pp", "ci95_high_pp", "mcnemar_p"):
            assert float(row[column]) == numbers[column]
        line = next(line for line in text.splitlines() if line.startswith(task["task"])).split()
        accuracies = [task[who] for who in ("start", "twin", "arm", "arm_off")]
        assert line[1:6] == [*(f"{100 * a:.2f}" for a in accuracies), f"{task['drop_pp']:+.2f}"]


def test_the_comparison_is_of_the_scores_beside_it(trained_world: Path) -> None:
    study = trained_world / "runs/tiny"
    (pair,) = read(study / "comparison.json")["pairs"]
    folders = {"start": "start/eval", "twin": "bf16/eval", "arm": "hif8/eval", "arm_off": "hif8/eval-quantizers-off"}
    scores = {who: Scores.load(study / folder) for who, folder in folders.items()}
    for task in pair["comparison"]["tasks"]:
        assert {who: task[who] for who in folders} == {who: s.tasks[task["task"]].accuracy for who, s in scores.items()}
    # The start model is another one than what training made of it, and the arms learned.
    likes = pair["comparison"]["tasks"][0]
    assert likes["start"] < 0.5 < min(likes["twin"], likes["arm"])
    assert set(pair["perplexity"]) == set(folders)
    assert pair["perplexity"]["start"] > 5 * pair["perplexity"]["twin"]


def test_an_arm_and_its_twin_are_the_trunk_and_then_the_same_data(trained_world: Path) -> None:
    study = trained_world / "runs/tiny"
    (trunk,) = study.glob("trunk-*")
    of_trunk, twin, arm = (read_metrics(folder / "metrics.jsonl") for folder in (trunk, study / "bf16", study / "hif8"))
    assert begun((trained_world / "tiny.log").read_text(encoding="utf-8")).count("training trunk") == 1
    assert [row["step"] for row in of_trunk] == list(range(1, 11))
    assert of_trunk == twin[:10] == arm[:10]
    assert [row["phase"] for row in twin] == ["bf16"] * 40
    assert [row["phase"] for row in arm] == ["bf16"] * 10 + ["qat"] * 30
    assert [row["learning_rate"] for row in arm] == [row["learning_rate"] for row in twin]
    assert all(row["loss"] != of_twin["loss"] for row, of_twin in zip(arm[10:], twin[10:], strict=True))


def test_result_of_an_arm(trained_world: Path) -> None:
    study = trained_world / "runs/tiny"
    bf16, hif8 = (read(study / arm / "result.json") for arm in ("bf16", "hif8"))
    assert bf16["match"] == hif8["match"]
    assert hif8["match"]["model"]["path"] == "model"
    expected = {"steps": 40, "learning_rate": 0.05, "seed": 0, "weight_decay": 0.1}
    assert expected.items() <= hif8["match"].items()
    assert not {"save_every", "keep_last", "micro_batch_size"} & hif8["match"].keys()
    assert len(hif8["match"]["data_hash"]) == 64
    assert (bf16["arm"], bf16["twin"], bf16["coverage"]) == ("bf16", None, None)
    assert (hif8["arm"], hif8["twin"]) == ("hif8", "bf16")
    assert hif8["coverage"] == "14 of 15 linears, 85% of linear FLOPs quantized"
    assert set(bf16["perplexity"]) == {"on"}
    assert set(hif8["perplexity"]) == {"on", "off"}
    assert hif8["sizes"] == {
        "plain_bytes": (study / "hif8/model.safetensors").stat().st_size,
        "quantized_bytes": (study / "hif8/quantized/model.safetensors").stat().st_size,
    }
    assert hif8["sizes"]["quantized_bytes"] < 0.5 * hif8["sizes"]["plain_bytes"]
    assert set(hif8["cost"]) == {"seconds", "peak_memory_bytes"}


def test_environment_and_recipe_are_kept(trained_world: Path) -> None:
    environment = read(trained_world / "runs/tiny/environment.json")
    matches = {arm: read(trained_world / f"runs/tiny/{arm}/result.json")["match"] for arm in ("bf16", "hif8")}
    expected = {arm: {"seed": 0, "data_hash": match["data_hash"]} for arm, match in matches.items()}
    assert environment["arms"] == expected
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["command"] == ["qatrun", "train", "tiny.yaml"]
    kept = qatrun.load_recipe(trained_world / "runs/tiny/recipe.yaml")
    assert kept == qatrun.load_recipe(trained_world / "tiny.yaml")


def test_a_trained_folder_opens_in_plain_transformers(trained_world: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = trained_world / "runs/tiny/bf16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not caplog.records
    assert model.dtype == torch.float32
    # It continues as the text does; the quantized one from the same command agrees.
    asked = torch.tensor([tokenizer("w1 w92 w1")["input_ids"]])
    quantized, _ = qatrun.load(trained_world / "runs/tiny/hif8")
    with torch.no_grad():
        assert model(asked).logits[0, -1].argmax() == quantized(asked).logits[0, -1].argmax()


# Arms.


def test_arms_of_another_learning_rate_have_a_trunk_and_a_twin_of_their_own(world: Path) -> None:
    low = "train: {learning_rate: 0.01}"
    arms = (
        f"arms={{bf16: {{qat: null}}, hif8: {{twin: bf16}}, low: {{qat: null, {low}}}, hif8-low: {{twin: low, {low}}}}}"
    )
    options = ("--set", "name=rates", "--set", arms, "--set", "model.compute_dtype=bfloat16", *SHORT)
    ran = run_qatrun("train", "tiny.yaml", *options, cwd=world)
    assert ran.code == 0, ran.err
    study = world / "runs/rates"
    assert len(list(study.glob("trunk-*"))) == 2
    assert begun(ran.out).count("training trunk") == 2
    pairs = {pair["arm"]: pair["twin"] for pair in read(study / "comparison.json")["pairs"]}
    assert pairs == {"hif8": "bf16", "hif8-low": "low"}
    matches = {arm: read(study / arm / "result.json")["match"] for arm in ("bf16", "hif8", "low", "hif8-low")}
    assert {arm: match["learning_rate"] for arm, match in matches.items()} == {
        "bf16": 0.05,
        "hif8": 0.05,
        "low": 0.01,
        "hif8-low": 0.01,
    }
    assert len({match["data_hash"] for match in matches.values()}) == 1
    model = AutoModelForCausalLM.from_pretrained(study / "bf16")
    assert model.dtype == torch.bfloat16
    assert Scores.load(study / "hif8/eval").settings["dtype"] == "bfloat16"


def test_an_arm_that_its_twin_does_not_match_is_refused_before_training(world: Path) -> None:
    arms = "arms={bf16: {qat: null}, hif8: {train: {learning_rate: 0.01}}}"
    ran = run_qatrun("train", "tiny.yaml", "--set", "name=odd", "--set", arms, cwd=world)
    message = "its twin 'bf16' has other learning_rate: name a twin that does not, or add one"
    assert (ran.code, ran.err) == (2, f"--set {arms}: arms.hif8.twin -- {message}\n")
    assert not (world / "runs/odd").exists()


def test_arms_start_from_one_model(world: Path) -> None:
    arms = "arms={bf16: {qat: null}, other: {qat: null, model: {revision: v2}}}"
    ran = run_qatrun("check", "tiny.yaml", "--set", arms, cwd=world)
    message = "all arms start from one model, here model; give another model a recipe of its own"
    assert (ran.code, ran.err) == (2, f"--set {arms}: arms.other.model.path -- {message}\n")


def test_a_study_of_bf16_alone_has_nothing_to_compare(world: Path) -> None:
    options = ("--set", "name=plain", "--set", "qat=null", "--set", "arms={bf16: {}}", *SHORT)
    ran = run_qatrun("train", "tiny.yaml", *options, "--fail-on-verdict", "--strict", cwd=world)
    assert ran.code == 0, ran.err
    assert read(world / "runs/plain/comparison.json") == {
        "study": "plain",
        "verdict": None,
        "pairs": [],
        "over_ptq": [],
    }
    assert (world / "runs/plain/comparison.csv").read_text() == ""


# Verdicts as exit codes.


@pytest.mark.parametrize(
    ("study", "options", "code"),
    [
        ("tiny", [], 0),
        ("tiny", ["--fail-on-verdict"], 0),
        ("tiny", ["--strict"], 0),
        ("tiny", ["--fail-on-verdict", "--strict"], 4),
        ("ruined", [], 0),
        ("ruined", ["--fail-on-verdict"], 1),
        ("ruined", ["--fail-on-verdict", "--strict"], 1),
    ],
)
def test_exit_code_of_train(world: Path, study: str, options: list[str], code: int) -> None:
    recipe = ["tiny.yaml"] if study == "tiny" else ["tiny.yaml", "--set", "name=ruined", "--set", RUINED_ARM]
    assert run_qatrun("train", *recipe, "--resume", *options, cwd=world).code == code


# Trackers, and Python.


def test_an_unknown_tracker_is_refused_before_anything_is_thrown_away(world: Path) -> None:
    ran = run_qatrun("train", "tiny.yaml", "--overwrite", "--track", "tensorbord", cwd=world)
    assert ran.code == 2
    assert ran.err.startswith("--track tensorbord: no such tracker here (one of all")
    assert (world / "runs/tiny/comparison.json").is_file()


def test_metrics_go_to_tensorboard(world: Path) -> None:
    pytest.importorskip("tensorboard")
    ran = run_qatrun("train", "tiny.yaml", "--set", "name=tracked", "--track", "tensorboard", *SHORT, cwd=world)
    assert ran.code == 0, ran.err
    assert list((world / "runs/tracked/hif8").rglob("events.out.tfevents.*"))


def test_run_from_python_writes_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    with one_thread():
        result = qatrun.run("tiny.yaml", ["train.steps=4", "warmup.steps=2"])
    assert result.folder == Path("runs/tiny")
    assert result.verdict == result.pairs[0].comparison.verdict
    assert {file.suffix for file in result.folder.glob("comparison.*")} == {".json", ".csv", ".txt"}
