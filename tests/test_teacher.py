"""Teachers: refused before the first step where they cannot teach, counted in what `check` says, and seen on the page."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_llama, word_tokenizer
from tiny_world import run_qatrun, write_world

from qatrun.recipe import load_recipe
from qatrun.study.checking import Preflight, preflight
from qatrun.study.dryrun import dry_run_of
from qatrun.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_world(tmp_path)
    return tmp_path


def checked(world: Path, **distill: dict[str, Any]) -> Preflight:
    """What a preflight says of a study of BF16 arms that each have another teacher."""
    arms = {name: {"qat": None, "train": {"distill": given}} for name, given in distill.items()}
    with contextlib.chdir(world):
        return preflight(load_recipe("tiny.yaml", [f"arms={json.dumps(arms)}"]))


def save(folder: Path, tokenizer: Any = None, **settings: Any) -> None:
    tiny_llama(eos_token_id=0, bos_token_id=None, **settings).save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)


def test_one_that_cannot_teach_is_refused_with_its_reason(world: Path) -> None:
    save(world / "larger", vocab_size=128)
    save(world / "short", max_position_embeddings=8)
    tokenizer = word_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    save(world / "swapped", tokenizer)
    file = world / "swapped/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": described["model"]}))
    names = ("larger", "short", "swapped", "nowhere")
    found = checked(world, **{name: {"teacher": name} for name in names}).problems
    said = {problem.key.split(".")[1]: problem.message for problem in found}
    assert {problem.key for problem in found} == {f"arms.{name}.train.distill.teacher" for name in names}
    assert said["larger"] == (
        "larger: the teacher has logits for 128 tokens, the model for 101: it must be a model with the same vocabulary"
    )
    assert said["short"] == "short: 16 tokens (data.seq_len) do not fit the teacher's context of 8"
    assert said["swapped"] == (
        "swapped: the teacher's tokenizer is another one: 'w1' is token 3 there and token 2 in the model's, so that its "
        "probabilities would be of other tokens"
    )
    assert "nowhere" in said["nowhere"]


def test_memory_counts_the_teacher(world: Path) -> None:
    save(world / "wide", intermediate_size=512)
    plan = checked(world, none={"weight": 0.0}, wide={"teacher": "wide"})
    assert not plan.problems
    own, wide = (sum(p.numel() for p in tiny_llama(**more).parameters()) for more in ({}, {"intermediate_size": 512}))
    assert plan.teachers == {"none": own, "wide": wide}
    with contextlib.chdir(world):
        arms = dry_run_of(plan).arms
    memory = {arm.name: arm.memory_bytes["bf16 training"] for arm in arms if arm.memory_bytes}
    assert memory["wide"] - memory["none"] == 4 * (wide - own), "in the compute dtype, float32"
    logits = 4 * 16 * 101  # of a micro-batch
    assert memory["none"] - untaught(world) == 4 * own + logits * (4 + 8)
    assert [arm.teacher for arm in arms] == [
        "loss: 1 cross-entropy + 0 KL from the start model",
        "loss: 0.5 cross-entropy + 0.5 KL from wide",
    ]


def untaught(world: Path) -> int:
    with contextlib.chdir(world):
        (arm,) = dry_run_of(preflight(load_recipe("tiny.yaml", ["arms={bf16: {qat: null}}"]))).arms
    assert arm.memory_bytes
    return arm.memory_bytes["bf16 training"]


def test_a_study_with_a_teacher_shows_how_far_it_went(world: Path) -> None:
    """The teacher is another folder's, whose probabilities are not the start model's."""
    torch.manual_seed(1)
    teacher = tiny_llama(eos_token_id=0, bos_token_id=None)
    for parameter in teacher.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    teacher.save_pretrained(world / "teacher")
    word_tokenizer().save_pretrained(world / "teacher")
    settings = ["train.steps=6", "warmup.steps=2", "diagnose.at_end=false", "eval.tasks={likes.yaml: 0}"]
    settings += ["train.distill={teacher: teacher, weight: 0.75}"]
    ran = run_qatrun("train", "tiny.yaml", *(f"--set={text}" for text in settings), cwd=world)
    assert ran.code == 0, ran.err
    assert "kl 0." in ran.out
    study = world / "runs/tiny"
    rows = {arm: read_metrics(study / arm / "metrics.jsonl") for arm in ("bf16", "hif8")}
    assert rows["bf16"][0]["distill_kl"] == rows["hif8"][0]["distill_kl"] > 0, "one trunk"
    with (study / "report/teacher.csv").open() as file:
        table = list(csv.DictReader(file))
    for arm, of_arm in rows.items():
        shown = [float(row[f"{arm} KL"]) for row in table]
        assert shown == pytest.approx([row["distill_kl"] for row in of_arm], rel=1e-4)
    assert "from its teacher" in (study / "report.html").read_text()
    assert "teacher" in json.loads((study / "environment.json").read_text())["inputs"]
    (world / "teacher/config.json").write_text("{}")
    again = run_qatrun("train", "tiny.yaml", "--resume", *(f"--set={text}" for text in settings), cwd=world)
    assert again.code == 2
    assert "train.distill.teacher" in again.err
