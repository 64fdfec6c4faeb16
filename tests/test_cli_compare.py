"""`qatrun compare`, `studies` and `clean` on studies that are there."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from tiny_world import run_qatrun

LIKES = "likes.yaml"

COLUMNS = (
    "arm_name,twin_name,task,metric,num_fewshot,num_items,start,twin,arm,arm_off,drop_pp,drop_relative_percent,"
    "ci95_low_pp,ci95_high_pp,mcnemar_p,flips_to_wrong,flips_to_right,mean_abs_delta_loglikelihood,"
    "detectable_drop_pp,budget_pp,verdict,items_to_settle,perplexity_twin,perplexity_arm,perplexity_rise_percent,"
    "perplexity_ci95_low_percent,perplexity_ci95_high_percent,perplexity_budget_percent,perplexity_verdict,"
    "training_drop_pp,training_ci95_low_pp,training_ci95_high_pp,training_budget_pp,training_verdict"
)
WIDE = tuple(f"--budget={task}" for task in ("likes.yaml=50", "demo_facts=50", "perplexity=50"))


@pytest.mark.parametrize(
    ("arguments", "took", "code"),
    [
        (["bf16", "ruined"], "bf16 and ruined of runs/ruined", 1),
        (["bf16", "hif8", "--study", "tiny"], "bf16 and hif8 of runs/tiny", 0),
        (["bf16", "hif8", "--study", "tiny", "--strict"], "bf16 and hif8 of runs/tiny", 4),
        (["bf16", "hif8", "--study", "tiny", "--strict", *WIDE], "bf16 and hif8 of runs/tiny", 0),
        (["runs/tiny/bf16", "runs/tiny/hif8"], "runs/tiny/bf16 and runs/tiny/hif8", 0),
        (["runs/tiny/bf16", "runs/ruined/ruined/"], "runs/tiny/bf16 and runs/ruined/ruined/", 1),
    ],
)
def test_compare_says_what_it_took_and_exits_by_the_verdict(
    trained_world: Path, arguments: list[str], took: str, code: int
) -> None:
    ran = run_qatrun("compare", *arguments, cwd=trained_world)
    assert (ran.code, ran.err) == (code, "")
    assert ran.out.splitlines()[0] == f"comparing {took}"


@pytest.mark.parametrize(("form", "begins"), [("markdown", "| arm | format |"), ("latex", r"\begin{tabular}")])
def test_every_arm_of_a_study_in_one_ranked_table(trained_world: Path, form: str, begins: str) -> None:
    shown = run_qatrun("compare", "--study", "tiny", cwd=trained_world)
    assert (shown.code, shown.out.splitlines()[0]) == (0, "comparing every arm of runs/tiny")
    assert "from start to what ships: hif8" in shown.out
    assert run_qatrun("compare", "--study", "tiny", "--format", form, cwd=trained_world).out.startswith(begins)
    pairs = json.loads(run_qatrun("compare", "--study", "tiny", "--json", cwd=trained_world).out)["pairs"]
    assert [pair["format"] for pair in pairs] == ["hif8"]


def test_clean_frees_checkpoints_of_a_finished_study_and_nothing_else(world: Path) -> None:
    listed = json.loads(run_qatrun("studies", "--json", cwd=world).out)
    assert [study["name"] for study in listed] == ["ruined", "tiny"]
    assert all(study["freed_bytes"] > 0 for study in listed)
    before = {file for file in (world / "runs/tiny").rglob("*") if file.is_file()}
    cleaned = run_qatrun("clean", "tiny", "--yes", cwd=world)
    assert cleaned.code == 0
    gone = before - {file for file in (world / "runs/tiny").rglob("*") if file.is_file()}
    assert gone
    assert all("checkpoints" in file.parts for file in gone)
    assert run_qatrun("clean", "tiny", "--yes", cwd=world).out == "runs/tiny: nothing to free\n"
    assert run_qatrun("compare", "bf16", "hif8", "--study", "tiny", cwd=world).code == 0
    assert "hif8: done already" in run_qatrun("train", "tiny.yaml", "--resume", cwd=world).out


def test_compare_repeats_what_train_wrote(trained_world: Path) -> None:
    arguments = ("compare", "bf16", "hif8", "--study", "tiny")
    written = json.loads((trained_world / "runs/tiny/comparison.json").read_text(encoding="utf-8"))
    assert json.loads(run_qatrun(*arguments, "--json", cwd=trained_world).out) == written["pairs"][0]
    text = run_qatrun(*arguments, "--csv", cwd=trained_world).out
    assert text == (trained_world / "runs/tiny/comparison.csv").read_text(encoding="utf-8")
    assert text.splitlines()[0] == COLUMNS
    assert [row["verdict"] for row in csv.DictReader(io.StringIO(text))] == ["inconclusive", "inconclusive"]


def test_two_arms_are_compared_with_what_the_diagnosis_found(world: Path) -> None:
    folder = world / "runs/tiny"
    found = {"sentence": "hif8: training forgot", "findings": ["forgetting"]}
    (folder / "diagnosis.json").write_text(json.dumps({"sentence": "", "arms": {"hif8": found}}), encoding="utf-8")
    next_step = "next: hif8: forgetting: `qatrun fix` tries the remedy as another arm"
    assert next_step in run_qatrun("compare", "bf16", "hif8", "--study", "tiny", cwd=world).out
    assert next_step in run_qatrun("compare", "--study", "tiny", cwd=world).out
    assert next_step not in run_qatrun("compare", "start", "hif8", "--study", "tiny", "--anyway", cwd=world).out


def test_arms_that_do_not_match_are_refused_reason_by_reason(world: Path) -> None:
    result = world / "runs/tiny/hif8/result.json"
    record = json.loads(result.read_text(encoding="utf-8"))
    record["match"] |= {"seed": 1, "data_hash": "abc"}
    result.write_text(json.dumps(record), encoding="utf-8")
    data_hash = json.loads((world / "runs/tiny/bf16/result.json").read_text(encoding="utf-8"))["match"]["data_hash"]
    arguments = ("compare", "bf16", "hif8", "--study", "tiny")
    reasons = ["seed -- the twin has 0, the arm 1", f"data_hash -- the twin has '{data_hash}', the arm 'abc'"]
    refused = run_qatrun(*arguments, cwd=world)
    assert (refused.code, refused.err.splitlines()) == (2, ["bf16 and hif8 do not match:", *reasons])
    anyway = run_qatrun(*arguments, "--anyway", cwd=world)
    assert anyway.code == 0
    assert anyway.out.splitlines()[-1] == f"compared anyway, although: {'; '.join(reasons)}"


def test_the_start_model_has_no_training_to_match(world: Path) -> None:
    refused = run_qatrun("compare", "start", "bf16", cwd=world)
    assert refused.code == 2
    assert refused.err.splitlines()[-1].startswith("no training record of both")
    assert run_qatrun("compare", "start", "bf16", "--anyway", cwd=world).code == 0


def test_scores_that_eval_wrote_can_be_compared_anyway(world: Path) -> None:
    for path, output in (("runs/tiny/bf16", "a"), ("runs/tiny/hif8", "b")):
        assert run_qatrun("eval", path, "--tasks", LIKES, "--output", f"scores/{output}", cwd=world).code == 0
    assert run_qatrun("eval", "model", "--tasks", LIKES, "--limit", "9", "--output", "scores/c", cwd=world).code == 0
    no_record = "no training record of both (result.json), so nothing shows that they match"
    refused = run_qatrun("compare", "scores/a", "scores/b", cwd=world)
    assert (refused.code, refused.err.splitlines()) == (2, ["a and b do not match:", no_record])
    pair = json.loads(run_qatrun("compare", "scores/a", "scores/b", "--anyway", "--json", cwd=world).out)
    (task,) = pair["comparison"]["tasks"]
    (of_study, _) = json.loads((world / "runs/tiny/comparison.json").read_text())["pairs"][0]["comparison"]["tasks"]
    assert (task["twin"], task["arm"], task["start"]) == (of_study["twin"], of_study["arm"], None)
    assert pair["mismatches"] == [no_record]
    settings = run_qatrun("compare", "scores/a", "scores/c", cwd=world).err.splitlines()
    assert "eval.limit -- the twin was scored with 60, the arm with 9" in settings
    items = run_qatrun("compare", "scores/a", "scores/c", "--anyway", cwd=world)
    assert items.code == 2
    assert items.err.startswith("likes.yaml -- not the same items: 60 for the twin, 9 for the arm, 9 in both")


# Where nobody watches.


def test_a_log_holds_no_control_characters_and_numbers_of_every_segment(trained_world: Path) -> None:
    log = (trained_world / "tiny.log").read_text(encoding="utf-8")
    assert all(character.isprintable() or character == "\n" for character in log)
    for segment in ("trunk", "bf16", "hif8"):
        assert f"training {segment} step " in log
    assert "\nhif8: saved to runs/tiny/hif8 (plain 87.2 KiB, quantized " in log
    assert log.endswith("\nall of it: runs/tiny\n")
