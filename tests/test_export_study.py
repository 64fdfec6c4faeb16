"""A study that ends with servable folders, and the verbs on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from studies import checksums, read
from tiny_world import run_qatrun, write_world

from qatrun.evaluate.scores import Scores
from qatrun.layout import StudyFolder
from qatrun.recipe import load_recipe
from qatrun.study.card import card
from qatrun.study.claim import locked

FP8 = "format: fp8_e4m3, scaling: {rounding: power_of_two}"
MIXED = (
    "[{match: '*.down_proj', format: int8, weight: {granularity: per_channel}}, "
    "{match: model.layers.0.self_attn.*, format: null}]"
)
ARMS = (
    f"arms={{bf16: {{qat: null}}, fp8: {{qat: {{{FP8}}}}}, mixed: {{qat: {{{FP8}, modules: {MIXED}}}}}, "
    "hif8: {export: []}}"
)
SHORT = (
    "--set",
    "train.steps=6",
    "--set",
    "warmup.steps=2",
    "--set",
    "diagnose.at_end=false",
    "--set",
    "name=served",
    "--set",
    "eval.limit=20",
)
EXPORTED = ("--set", "export=[compressed-tensors]")


@pytest.fixture(scope="module")
def trained_exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny world with a study whose FP8 arm, of power-of-two scales, was exported."""
    pytest.importorskip("compressed_tensors")
    folder = tmp_path_factory.mktemp("served")
    write_world(folder)
    ran = run_qatrun("train", "tiny.yaml", "--set", ARMS, *SHORT, *EXPORTED, cwd=folder)
    assert ran.code == 0, ran.err
    (folder / "train.log").write_text(ran.out, encoding="utf-8")
    return folder


@pytest.fixture
def served(trained_exports: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(trained_exports, tmp_path / "served"))


@pytest.mark.parametrize("name", ["fp8", "mixed"])
def test_training_ends_with_a_folder_that_is_proven_and_scored(trained_exports: Path, name: str) -> None:
    """In transformers, and there through lm-eval: bit for bit, with some linears in FP8, some in INT8, some in BF16 too."""
    arm = trained_exports / "runs" / "served" / name
    record = read(arm / "compressed-tensors" / "export.json")
    assert record["linears_proof"]["rows_equal"] == record["linears_proof"]["rows"]
    assert record["text_proof"]["text"] == "the study's held-out text"
    assert record["text_proof"]["equal"]
    assert record["text_proof"]["perplexity_scored"] == pytest.approx(read(arm / "result.json")["perplexity"]["on"])
    (match,) = record["scored"]
    assert (match["engine"], match["verdict"]) == ("transformers", "within")
    assert {task["max_abs_delta_loglikelihood"] for task in match["tasks"]} == {0.0}
    own, theirs = (Scores.load(arm / name) for name in ("eval", "eval-compressed-tensors"))
    assert own.tasks.keys() == theirs.tasks.keys()
    assert not (arm.parent / "hif8" / "compressed-tensors").exists()
    log = (trained_exports / "train.log").read_text()
    assert f"{name} as compressed-tensors: logits: equal, bit for bit" in log
    assert "log-likelihoods equal, bit for bit" in log


def test_schemes_per_module_are_told_wherever_an_arm_is(trained_exports: Path) -> None:
    study = trained_exports / "runs" / "served"
    schemes = read(study / "mixed" / "compressed-tensors" / "export.json")["schemes"]
    fp8, int8 = "fp8_e4m3 weights per_tensor, fp8_e4m3", "int8 weights per_channel, int8"
    assert schemes == {f"{fp8} inputs per_tensor, frozen": 8, f"{int8} inputs per_tensor, frozen": 2}
    covered = "10 of 15 linears"
    assert read(study / "mixed" / "result.json")["coverage"].startswith(covered)
    assert covered in (trained_exports / "train.log").read_text()
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "weight int8 per_channel, input int8 per_tensor" in page
    (card,) = (ModelCard.load(study / "mixed" / "compressed-tensors" / "README.md"),)
    assert card.data.tags == ["qatrun", "compressed-tensors", "fp8_e4m3", "int8"]


def test_every_folder_has_a_card_that_the_hub_reads(trained_exports: Path) -> None:
    study = trained_exports / "runs" / "served"
    places = ("bf16", "fp8", "fp8/compressed-tensors", "hif8")
    cards = {place: ModelCard.load(study / place / "README.md") for place in places}
    exported = cards["fp8/compressed-tensors"]
    scored = Scores.load(study / "fp8" / "eval").tasks
    assert {result.dataset_name: result.metric_value for result in exported.data.eval_results or ()} == {
        name: round(task.accuracy, 6) for name, task in scored.items()
    }
    assert exported.data.tags == ["qatrun", "compressed-tensors", "fp8_e4m3"]
    assert exported.data.base_model is None  # a folder here, which is no id of the hub's
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "Exported folders" in page
    assert "Logits: equal, bit for bit" in page
    for said in (
        "vllm serve runs/served/fp8/compressed-tensors",
        "- logits: equal, bit for bit",
        "log-likelihoods equal, bit for bit",
        read(study / "fp8" / "result.json")["match"]["data_hash"],
        "| demo_facts | 0 | acc | 20 | ",
        "rounding: power_of_two",
    ):
        assert said in exported.content, said
    assert "quantizers off" in cards["fp8"].content
    assert "the twin that quantized arms are compared with" in cards["bf16"].content
    arm = load_recipe(study / "recipe.yaml").arm_by_name["fp8"]
    with_id = arm.model_copy(update={"model": arm.model.model_copy(update={"path": "org/model"})})
    text = card(StudyFolder(study), with_id, study / "fp8" / "compressed-tensors")
    assert "\nbase_model: org/model\n" in text
    assert "\nbase_model_relation: quantized\n" in text


def test_a_resume_exports_what_is_missing_and_nothing_else(served: Path) -> None:
    arm = served / "runs" / "served" / "fp8"
    resume = ("train", "tiny.yaml", "--set", ARMS, *SHORT, *EXPORTED, "--resume")
    assert "holds a study that is finished" in run_qatrun(*resume[:-1], cwd=served).err
    before = checksums(arm / "compressed-tensors")
    assert run_qatrun(*resume, cwd=served).code == 0
    assert checksums(arm / "compressed-tensors") == before
    shutil.rmtree(arm / "compressed-tensors")
    assert "holds a study that is unfinished" in run_qatrun(*resume[:-1], cwd=served).err
    assert run_qatrun(*resume, cwd=served).code == 0
    assert checksums(arm / "compressed-tensors") == before


def test_an_exported_folder_is_scored_in_its_engine_and_compared(served: Path) -> None:
    folder = "runs/served/fp8/compressed-tensors"
    file = served / folder / "export.json"
    kept = file.read_text()
    file.write_text(json.dumps(json.loads(kept) | {"scored": []}))
    ran = run_qatrun("eval", folder, "--engine", "transformers", "--json", cwd=served)
    assert ran.code == 0, ran.err
    scored = json.loads(ran.out)
    assert scored["model"] == f"{folder} (in transformers)"
    assert [task["flips_to_wrong"] for task in scored["match"]["tasks"]] == [0, 0]
    assert json.loads(file.read_text()) == json.loads(kept)
    ran = run_qatrun("eval", folder, "--tasks", "demo_facts", "--limit", "5", "--json", cwd=served)
    assert json.loads(ran.out)["match"] is None  # not the items that the arm was scored on


def test_nothing_is_exported_under_a_process_that_runs_the_study(served: Path) -> None:
    with locked(StudyFolder(served / "runs" / "served")):
        ran = run_qatrun("export", "runs/served/fp8", cwd=served)
    assert ran.code == 2
    assert "name -- another process is running the study in" in ran.err
    assert run_qatrun("export", "runs/served/fp8", cwd=served).code == 0


def test_an_overwritten_study_leaves_nothing_of_its_exports(served: Path) -> None:
    (served / "runs/served/fp8/.compressed-tensors.partial").mkdir()
    (served / "runs/served/fp8/.compressed-tensors.partial/model.safetensors").write_bytes(b"")
    ran = run_qatrun("train", "tiny.yaml", "--set", ARMS, *SHORT, "--overwrite", "--set", "arms={hif8: {}}", cwd=served)
    assert ran.code == 0, ran.err
    assert "left in" not in ran.out + ran.err
    assert not (served / "runs/served/fp8").exists()


def test_check_names_what_cannot_be_exported_before_anything_is_trained(tmp_path: Path) -> None:
    write_world(tmp_path)
    ran = run_qatrun(
        *("check", "tiny.yaml", *EXPORTED, "--set", "arms.part={qat: {format: int8, ignore: ['*.v_proj']}}"),
        cwd=tmp_path,
    )
    assert ran.code == 2
    assert (
        "--set export=[compressed-tensors]: export -- arm 'hif8' as compressed-tensors: compressed-tensors has no"
        in ran.err
    )
    assert "arm 'part' as compressed-tensors: vLLM merges model.layers.0.self_attn.q_proj" in ran.err
    assert "'bf16'" not in ran.err
    ran = run_qatrun("check", "tiny.yaml", *EXPORTED, "--set", "qat.format=int8", cwd=tmp_path)
    assert "in the end exported as compressed-tensors, proven equal and scored again" in ran.out
