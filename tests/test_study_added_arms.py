"""A resume with changed settings as a new arm: it is trained and nothing else; what numbers depend on is not changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies import checksums, read
from tiny_world import Ran, begun, run_qatrun

from qatrun.recipe import load_recipe


def train(folder: Path, *options: str) -> Ran:
    return run_qatrun("train", "tiny.yaml", *options, cwd=folder)


def trained(study: Path) -> dict[str, str]:
    """Checksums of what training and scoring left."""
    kept = ("items.parquet", ".safetensors", "metrics.jsonl", "result.json")
    return {name: digest for name, digest in checksums(study).items() if name.endswith(kept)}


def test_an_added_arm_is_trained_and_nothing_else(world: Path) -> None:
    before = trained(world / "runs/tiny")
    wider = ("--set", "arms.wide.qat.scaling={window: 8}")
    ran = train(world, *wider, "--set", "budget.demo_facts=2", "--set", "contrasts.x=[wide, hif8]", "--resume")
    assert ran.code == 0, ran.err
    # The first trunk saw no more than a window of 4.
    assert begun(ran.out) == ["training trunk", "training wide"]
    assert before.items() <= trained(world / "runs/tiny").items()
    comparison = read(world / "runs/tiny/comparison.json")
    assert [pair["arm"] for pair in comparison["pairs"]] == ["hif8", "wide"]
    assert comparison["pairs"][0]["comparison"]["tasks"][1]["budget_pp"] == 2
    kept = load_recipe(world / "runs/tiny/recipe.yaml")
    assert (kept.arm_names, kept.budget["demo_facts"]) == (("bf16", "hif8", "wide"), 2)
    assert read(world / "runs/tiny/seeds.json")["contrasts"][0]["name"] == "x"
    refused = train(world, "--resume")
    assert refused.code == 2
    assert "runs/tiny was made with other settings: arms.wide (removed)" in refused.err


def test_an_added_arm_that_sees_no_more_shares_the_trunk(world: Path) -> None:
    ran = train(world, "--set", "arms.narrow.qat={clip: target, scaling: {window: 2}}", "--resume")
    assert ran.code == 0, ran.err
    assert "training trunk" not in ran.out
    assert len(list((world / "runs/tiny").glob("trunk-*"))) == 1


def test_a_twin_that_only_had_to_be_named_is_no_change(world: Path) -> None:
    options = ("--set", "arms.hif8.twin=bf16", "--set", "arms.low={qat: null, train: {learning_rate: 0.01}}")
    ran = train(world, *options, "--resume")
    assert ran.code == 0, ran.err
    assert "hif8: done already" in ran.out


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("eval.limit=30", "eval.limit (60 -> 30)"),
        ("arms.bf16={}", "arms.bf16.qat (None -> not given)"),
        ("train.seeds=[0]", "train.seeds (None -> [0])"),
        ("arms={hif8: {}}", "arms.bf16 (removed)"),
    ],
)
def test_what_numbers_depend_on_is_not_changed(world: Path, setting: str, shown: str) -> None:
    before = checksums(world)
    ran = train(world, "--resume", "--set", setting)
    assert ran.code == 2
    assert f"runs/tiny was made with other settings: {shown}" in ran.err
    assert checksums(world) == before
