"""What lies on disk is lost, torn, changed, moved or another process's: said, made again or refused, never averaged in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from studies import SHORT, checksums, interrupt_at, outcome, read
from tiny_world import run_qatrun

from qatrun.errors import DamagedFileError
from qatrun.layout import StudyFolder
from qatrun.recipe import load_recipe
from qatrun.report import TerminalDisplay
from qatrun.study.claim import claimed
from qatrun.study.page import read_study, write_page
from qatrun.study.pairs import compare_named

Damage = Callable[[Path], None]


def cut(name: str) -> Damage:
    def damage(study: Path) -> None:
        for file in study.glob(name):
            os.truncate(file, file.stat().st_size // 2)

    return damage


def flip_a_bit(name: str) -> Damage:
    def damage(study: Path) -> None:
        content = bytearray((study / name).read_bytes())
        content[-9] ^= 64
        (study / name).write_bytes(content)

    return damage


def lengthen(name: str) -> Damage:
    """By a blank line: a tokenizer that says the same."""

    def damage(study: Path) -> None:
        (study / name).write_bytes((study / name).read_bytes() + b"\n")

    return damage


def remove(*names: str) -> Damage:
    def damage(study: Path) -> None:
        for path in (path for name in names for path in study.glob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def copy(name: str, target: str) -> Damage:
    def damage(study: Path) -> None:
        (path,) = study.glob(name)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, path.with_name(target))

    return damage


def both(*damages: Damage) -> Damage:
    def damage(study: Path) -> None:
        for each in damages:
            each(study)

    return damage


def empty_manifest(study: Path) -> None:
    remove("hif8/result.json")(study)
    (study / "hif8/checkpoints/step-000040/manifest.json").write_text("{}", encoding="utf-8")
    flip_a_bit("hif8/checkpoints/step-000040/model.safetensors")(study)


# What is damaged -> what a resume says of it. In the end the study is what it was.
MADE_AGAIN: dict[str, tuple[Damage, str]] = {
    "an arm's record": (cut("bf16/result.json"), "bf16/result.json cannot be read"),
    "an arm's weights": (remove("bf16/model.safetensors"), "bf16/model.safetensors is gone: made again"),
    "quantized weights": (
        flip_a_bit("hif8/quantized/model.safetensors"),
        "hif8/quantized/model.safetensors is not what was scored: made again",
    ),
    "a plan": (cut("hif8/quantized/plan.json"), "hif8/quantized/plan.json is not what was scored: made again"),
    "scores of the start model": (
        remove("start/eval"),
        "start model: scored again, because runs/tiny/start/eval: no scores",
    ),
    "the start model's record": (cut("start/result.json"), "start/result.json cannot be read"),
    "items of an arm": (
        cut("hif8/eval/items.parquet"),
        "hif8: scored again, because runs/tiny/hif8/eval: items.parquet",
    ),
    "scores with quantizers off": (remove("hif8/eval-quantizers-off"), "hif8: scored again"),
    "what it ran on": (cut("environment.json"), "environment.json cannot be read"),
    "a manifest": (empty_manifest, "manifest.json lacks model.safetensors"),
    "an arm and all checkpoints of its trunk": (
        both(remove("hif8/result.json", "hif8/checkpoints"), cut("trunk-*/checkpoints/*/model.safetensors")),
        "holds no whole checkpoint to branch from: trained again",
    ),
    "calibrated scores": (cut("bf16/eval-calibrated-*/scores.json"), "scoring bf16 quantized after training"),
    "a diagnosis": (remove("diagnosis.json", "report.html"), "hif8: done already"),
    "copies": (
        both(
            remove("hif8/result.json"),
            copy("hif8/checkpoints/step-000040", "step-000040 (copy)"),
            copy("hif8/tensors/step-000040.parquet", "step-000040-old.parquet"),
        ),
        "training hif8",
    ),
}


@pytest.mark.parametrize(("damage", "said"), MADE_AGAIN.values(), ids=MADE_AGAIN)
def test_what_is_lost_or_torn_is_made_again_and_said(world: Path, damage: Damage, said: str) -> None:
    study = world / "runs/tiny"
    before = outcome(study)
    damage(study)
    ran = run_qatrun("train", "tiny.yaml", "--resume", cwd=world)
    assert ran.code == 0, ran.err
    assert said in ran.out
    after = outcome(study)
    for arm in ("bf16", "hif8"):  # copies are left
        after[arm]["files"] = {name: each for name, each in after[arm]["files"].items() if name in before[arm]["files"]}
    assert after == before
    assert (study / "diagnosis.json").is_file()


def test_a_record_that_is_lost_is_said_and_no_mean_is_taken_over_the_rest(world: Path) -> None:
    study = world / "runs/tiny"
    rows = (study / "hif8/metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (study / "hif8/metrics.jsonl").write_text("".join(rows[:20] + rows[21:]), encoding="utf-8")
    remove("hif8/result.json")(study)
    ran = run_qatrun("train", "tiny.yaml", "--resume", cwd=world)
    assert ran.code == 0, ran.err
    assert (
        "warning: runs/tiny/hif8/metrics.jsonl has lost 1 of the first 40 steps (the first of them step 21)" in ran.out
    )
    assert read(study / "comparison.json")["pairs"][0]["loss_ape_percent"] == {}


def test_steps_of_the_trunk_are_not_lost_with_an_arm_s_record(world: Path) -> None:
    study = world / "runs/tiny"
    before = outcome(study)
    remove("hif8/result.json", "hif8/checkpoints", "hif8/metrics.jsonl")(study)
    ran = run_qatrun("train", "tiny.yaml", "--resume", cwd=world)
    assert ran.code == 0, ran.err
    assert "warning" not in ran.out
    assert outcome(study) == before


def test_a_study_without_its_diagnosis_is_not_finished(world: Path) -> None:
    remove("diagnosis.json", "report.html")(world / "runs/tiny")
    ran = run_qatrun("train", "tiny.yaml", cwd=world)
    assert ran.code == 2
    assert "unfinished (--resume to go on with it" in ran.err


def test_a_study_may_be_moved(world: Path) -> None:
    remove("hif8/result.json")(world / "runs/tiny")
    before = checksums(world / "runs/tiny/bf16") | {"README.md": ""}  # its card says where it lies
    (world / "big").mkdir()
    (world / "runs/tiny").rename(world / "big/renamed")
    moved = ("--set", "output_dir=big", "--set", "name=renamed")
    ran = run_qatrun("train", "tiny.yaml", "--resume", *moved, cwd=world)
    assert ran.code == 0, ran.err
    assert "bf16: done already" in ran.out
    assert checksums(world / "big/renamed/bf16") | {"README.md": ""} == before


@pytest.mark.parametrize(
    "left",
    [
        {".lock": "", ".environment.json.partial": '{"date'},
        {".lock": "", "environment.json": ""},
        {"environment.json": '{"date": "2026'},
        {"recipe.yaml": ""},
    ],
)
def test_first_files_that_were_never_whole_stop_nobody(world: Path, left: dict[str, str]) -> None:
    folder = StudyFolder(world / "runs/torn")
    folder.path.mkdir()
    for name, text in left.items():
        (folder.path / name).write_text(text, encoding="utf-8")
    recipe = load_recipe(world / "tiny.yaml")
    with claimed(folder, recipe, resume=False, overwrite=False, warn=lambda _: None):
        assert load_recipe(folder.recipe) == recipe
        assert read(folder.environment)["packages"]


@pytest.mark.parametrize("name", ["environment.json", "recipe.yaml"])
def test_what_is_somebody_else_s_is_no_study(world: Path, name: str) -> None:
    folder = world / "runs/theirs"
    folder.mkdir()
    (folder / name).write_text('{"conda": ["numpy"]}', encoding="utf-8")
    for option in ("--resume", "--overwrite"):
        ran = run_qatrun("train", "tiny.yaml", option, "--set", "name=theirs", cwd=world)
        assert ran.code == 2
        assert "runs/theirs holds something that is no study; give another name" in ran.err
    assert list(checksums(folder)) == [name], "not even a lock"


# Text and model under a study.


@pytest.mark.parametrize("file", ["text.jsonl", "model/model.safetensors", "model/tokenizer.json"])
def test_a_resume_over_another_text_or_model_is_refused(world: Path, file: str) -> None:
    remove("hif8/result.json")(world / "runs/tiny")
    before = checksums(world / "runs/tiny")
    change = lengthen if file.endswith("tokenizer.json") else flip_a_bit
    change(file)(world)
    stat = (world / file).stat()
    os.utime(world / file, ns=(stat.st_atime_ns, 0))  # its time says nothing
    ran = run_qatrun("train", "tiny.yaml", "--resume", cwd=world)
    assert ran.code == 2
    assert f"{file.partition('/')[0]} has changed since runs/tiny was begun with it" in ran.err
    assert ran.err.startswith("tiny.yaml:")
    assert checksums(world / "runs/tiny") == before


def test_a_text_that_changes_under_a_run_stops_it(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(world / "runs")

    def change() -> None:
        with (world / "text.jsonl").open("a", encoding="utf-8") as stream:
            stream.write('{"text": "w1 w2"}\n')

    interrupt_at(monkeypatch, "trunk", 10, change)
    ran = run_qatrun("train", "tiny.yaml", cwd=world)
    assert ran.code == 2
    assert "text.jsonl has changed since runs/tiny was begun with it" in ran.err
    assert not (world / "runs/tiny/bf16").exists()


# Another process.


@pytest.mark.parametrize(
    "options",
    [["--overwrite"], ["--resume"], ["--resume", "--set", "arms.extra.qat.format=int8"], ["--overwrite", *SHORT]],
    ids=" ".join,
)
def test_nothing_changes_under_a_process_that_runs_the_study(world: Path, options: list[str]) -> None:
    before = checksums(world)
    with FileLock(world / "runs/tiny/.lock"):
        ran = run_qatrun("train", "tiny.yaml", *options, cwd=world)
        diagnosed = run_qatrun("diagnose", "tiny", cwd=world)
    for refused in (ran, diagnosed):
        assert refused.code == 2
        assert "another process is running the study in runs/tiny" in refused.err
    assert checksums(world) == before


def test_overwrite_waits_for_no_seed_that_another_process_runs(world: Path) -> None:
    """A study over seeds is made of studies that can be run by themselves."""
    (world / "runs/tiny").rename(world / "runs/seed-0")
    (world / "runs/many").mkdir()
    (world / "runs/seed-0").rename(world / "runs/many/seed-0")
    for name in ("recipe.yaml", "environment.json"):
        shutil.copy(world / "runs/many/seed-0" / name, world / "runs/many")
    before = checksums(world / "runs/many/seed-0")
    with FileLock(world / "runs/many/seed-0/.lock"):
        ran = run_qatrun("train", "tiny.yaml", "--overwrite", "--set", "name=many", cwd=world)
    assert ran.code == 2
    assert "another process is running the study in runs/many/seed-0" in ran.err
    assert checksums(world / "runs/many/seed-0") == before


# Ctrl-C where nothing trains.


@pytest.mark.parametrize(
    ("verb", "code", "said"),
    [
        (["train", "tiny.yaml", "--resume"], 3, "what is saved in runs/tiny is kept; go on with --resume"),
        (["diagnose", "tiny"], 130, "models scored for runs/tiny are saved; qatrun diagnose goes on from there"),
    ],
)
def test_ctrl_c_while_scoring_says_what_is_saved(
    world: Path, monkeypatch: pytest.MonkeyPatch, verb: list[str], code: int, said: str
) -> None:
    remove("hif8/eval-calibrated-*")(world / "runs/tiny")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TerminalDisplay, "on_scored", stop)
    ran = run_qatrun(*verb, cwd=world)
    assert ran.code == code
    assert said in ran.out + ran.err


# Verbs that read.

READ: dict[str, list[str]] = {
    "report": [
        *(
            "environment.json",
            "comparison.json",
            "diagnosis.json",
            "*/result.json",
            "*/metrics.jsonl",
            "*/alarms.jsonl",
        ),
        *("hif8/histograms.json", "hif8/quantized/plan.json", "hif8/tensors/step-000040.parquet"),
    ],
    "compare": ["[bhs]*/result.json", "[bh]*/metrics.jsonl", "*/eval/scores.json", "*/eval/items.parquet"],
}
CONTENTS = [
    b"",
    b"{",
    b"null\n",
    b"[]\n",
    b'"x"\n',
    b"7\n",
    b"\x00" * 50 + b"\n",
    b'{"a": 1, "arms": 3, "tasks": []}\n',
]


def read_as(verb: str, study: Path) -> None:
    if verb == "report":
        read_study(StudyFolder(study))
    else:
        compare_named("bf16", "hif8", study=None, output_dir=study.parent)


@pytest.mark.parametrize("verb", READ)
def test_whoever_reads_a_damaged_file_names_it(world: Path, verb: str) -> None:
    study = world / "runs/tiny"
    shutil.rmtree(world / "runs/ruined")
    read_as(verb, study)
    for file in sorted(file for name in READ[verb] for file in study.glob(name)):
        if (file.is_relative_to(study / "start") and verb == "report") or file.parent.name.startswith("trunk"):
            continue
        whole = file.read_bytes()
        for content in (*CONTENTS, whole[: len(whole) // 2], whole[1:]):
            file.write_bytes(content)
            crashed = file.suffix == ".jsonl" and not content.endswith(b"\n")
            if crashed or (file.name == "environment.json" and content == CONTENTS[-1]):
                continue  # nothing is wrong with these
            with pytest.raises(DamagedFileError) as damaged:
                read_as(verb, study)
            assert file.name in str(damaged.value) or file.parent.name in str(damaged.value), (file, content)
        file.write_bytes(whole)
    read_as(verb, study)


NONSENSE: list[tuple[str, Callable[[Any], None]]] = [
    ("comparison.json", lambda c: c["pairs"][0]["comparison"]["tasks"][0].update(ci95_pp=[1.0])),
    ("comparison.json", lambda c: c["pairs"][0].update(cost={"arm": "cheap"})),
    ("diagnosis.json", lambda d: d["arms"]["hif8"]["effects"][0].pop("from")),
    ("hif8/result.json", lambda r: r.update(perplexity={"on": "low"})),
    ("hif8/histograms.json", lambda h: h["tensors"][0].update(counts=["many"])),
    ("hif8/quantized/plan.json", lambda p: p["plan"].update(linears="all")),
    ("environment.json", lambda e: e.update(packages=["qatrun"])),
]


@pytest.mark.parametrize(("name", "change"), NONSENSE)
def test_a_page_is_not_made_of_nonsense(world: Path, name: str, change: Callable[[Any], None]) -> None:
    file = world / "runs/tiny" / name
    content = read(file)
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DamagedFileError, match=f"{name} cannot be read"):
        write_page(StudyFolder(world / "runs/tiny"))


def test_a_verb_ends_in_one_line_and_2(world: Path) -> None:
    cut("hif8/result.json")(world / "runs/tiny")
    cut("hif8/quantized/plan.json")(world / "runs/tiny")
    for verb, named in (
        (["report", "tiny"], "result.json"),
        (["compare", "bf16", "hif8", "--study", "tiny"], "result.json"),
        (["diagnose", "tiny"], "result.json"),
        (["eval", "runs/tiny/hif8"], "plan.json"),
    ):
        ran = run_qatrun(*verb, cwd=world)
        assert ran.code == 2
        assert f"{named} cannot be read" in ran.err
        assert ran.err.count("\n") == 1


def test_scores_that_are_gone_are_not_left_out_in_silence(world: Path) -> None:
    remove("start/eval")(world / "runs/tiny")
    ran = run_qatrun("compare", "bf16", "hif8", "--study", "tiny", cwd=world)
    assert ran.code == 2
    assert "runs/tiny/start/eval: no scores here" in ran.err
