"""What is not supported says so, and names the nearest way; the shell completes what is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import a_dry_run, drawn
from tiny_world import run_qatrun

from qatrun import completion
from qatrun.errors import InputError
from qatrun.formats import get_format
from qatrun.records.dryrun import DryRunTask
from qatrun.report import dry_run
from qatrun.serving import EXPORT_NAMES, known
from qatrun.study.checking import tracker_problems


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int4", "unknown format 'int4': all formats have 8 bits (one of hif8, fp8_e4m3, fp8_e5m2, int8)"),
        ("NF4", "all formats have 8 bits"),
        ("bf16", "an arm without quantizers is written `qat: null`"),
        ("hif9", "unknown format 'hif9' (did you mean 'hif8'?)"),
    ],
)
def test_formats_that_are_not_here(name: str, says: str) -> None:
    with pytest.raises(InputError) as refused:
        get_format(name)
    assert says in str(refused.value)


def test_an_adapter_and_a_gguf_file_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/model-q8_0.gguf").write_bytes(b"GGUF")
    for path, says in (("adapter", "merge it first"), ("llama", "name the Hugging Face checkpoint")):
        ran = run_qatrun("eval", path, cwd=tmp_path)
        assert ran.code == 2
        assert says in ran.err
        assert "Traceback" not in ran.err


def test_llama_cpp_and_trackers_that_are_not_installed() -> None:
    with pytest.raises(InputError, match=r"convert_hf_to_gguf\.py"):
        known("gguf", EXPORT_NAMES, "--to")
    (problem,) = tracker_problems(["swanlab"])
    assert str(problem) == "--track swanlab: not installed: pip install swanlab"


def test_what_too_few_items_cannot_judge_is_said() -> None:
    task = DryRunTask(
        name="mmlu",
        num_fewshot=0,
        metric="acc",
        num_items=40,
        source="x",
        budget_pp=2.0,
        detectable_drop_pp=20.0,
        missing=None,
    )
    lines = "\n".join(drawn(dry_run(a_dry_run(tasks=[task.to_dict()], name="x", training_seconds=65.0)), 100))
    assert "mmlu: 40 items cannot judge a budget of 2 pp; about 4,000 could" in lines
    assert "training takes about 1:05 here" in lines


def test_the_shell_completes_verbs_recipes_studies_and_arms(
    trained_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained_world)
    assert completion.recipes("de") == ["demo"]
    assert completion.recipes("tiny") == ["tiny.yaml"]
    assert completion.arm_folders("runs/tiny/h") == ["runs/tiny/hif8"]
    words = {"COMP_WORDS": "qatrun compare --study tiny h", "COMP_CWORD": "4", "_QATRUN_COMPLETE": "complete_bash"}
    for line, place, offered in (("qatrun stu", "1", "studies"), ("qatrun report ti", "2", "tiny")):
        given = {**os.environ, **words, "COMP_WORDS": line, "COMP_CWORD": place}
        ran = subprocess.run([sys.executable, "-m", "qatrun"], env=given, capture_output=True, text=True, check=False)
        assert ran.stdout.split() == [offered], ran.stderr
