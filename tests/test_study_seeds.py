"""`train.seeds`, contrasts, and a resume with more of either: what lies where, what is trained, what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console
from studies import checksums, interrupt_at, read
from tiny_world import Ran, begun, run_qatrun, write_world

from qatrun.evaluate.paired import t_interval, worst_verdict
from qatrun.files import read_json, sha256
from qatrun.layout import StudyFolder, newest_study
from qatrun.recipe import load_recipe
from qatrun.records.comparison import StudyComparison
from qatrun.records.seeds import Seeds
from qatrun.report.seeds_table import seeds_table
from qatrun.study.checking import preflight
from qatrun.study.evidence import summarize

SHORT = ("--set", "train.steps=6", "--set", "warmup.steps=2", "--set", "qat.scaling.window=2")
CONTRASTS = ("--set", "contrasts={quantization: [hif8, bf16], training: [bf16, start]}")
SEEDS = ("--set", "train.seeds=[0,1]", "--set", "name=many", *SHORT, *CONTRASTS)


def train(folder: Path, *options: str) -> Ran:
    return run_qatrun("train", "tiny.yaml", *options, cwd=folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a finished study over seeds 0 and 1, `runs/many`, to look at only."""
    folder = tmp_path_factory.mktemp("seeds")
    write_world(folder)
    ran = train(folder, *SEEDS)
    assert ran.code == 0, ran.err
    (folder / "many.log").write_text(ran.out, encoding="utf-8")
    return folder


@pytest.fixture
def seeded(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "world"))


def numbers(study: Path) -> dict[str, str]:
    """Checksums of everything that neither the clock nor an interruption changes."""
    kept = ("items.parquet", "model.safetensors", "seeds.json")
    return {
        name: digest
        for name, digest in checksums(study).items()
        if name.endswith(kept) and ("checkpoints" not in name or "step-000006" in name)
    }


# What a study over seeds holds.


def test_every_seed_is_a_study_in_a_folder_of_its_own(finished: Path) -> None:
    study = finished / "runs/many"
    top = {file.name for file in study.iterdir()}
    assert top >= {"recipe.yaml", "environment.json", "seeds.json", "seeds.csv", "comparison.txt", "seed-0", "seed-1"}
    assert not {"bf16", "hif8", "start", "comparison.json"} & top
    whole = load_recipe(study / "recipe.yaml")
    for seed in (0, 1):
        recipe = load_recipe(study / f"seed-{seed}/recipe.yaml")
        assert (recipe.train.seed, recipe.train.seeds) == (seed, None)
        assert (recipe.output_dir, recipe.name) == ("runs/many", f"seed-{seed}")
        assert (recipe.arms, recipe.eval, recipe.contrasts) == (whole.arms, whole.eval, whole.contrasts)
        assert read(study / f"seed-{seed}/hif8/result.json")["match"]["seed"] == seed
    assert [replica.name for replica in StudyFolder(study).replicas] == ["seed-0", "seed-1"]
    assert len({sha256(replica.start.known_text) for replica in StudyFolder(study).replicas}) == 1  # one text for all


def test_a_seed_gives_what_it_gives_alone(seeded: Path) -> None:
    assert train(seeded, "--set", "train.seed=1", "--set", "name=alone", *SHORT, *CONTRASTS).code == 0
    of_many, alone = numbers(seeded / "runs/many/seed-1"), numbers(seeded / "runs/alone")
    assert of_many.pop("seeds.json") != alone.pop("seeds.json")  # each names its study
    assert of_many == alone
    assert of_many != {name: digest for name, digest in numbers(seeded / "runs/many/seed-0").items() if name in of_many}


def test_the_start_model_is_scored_once(finished: Path) -> None:
    log = (finished / "many.log").read_text(encoding="utf-8")
    assert log.count(": scoring start model") == 1
    assert begun(log).count("training trunk") == 2
    one, other = (checksums(finished / f"runs/many/seed-{seed}/start") for seed in (0, 1))
    assert one == other


def test_a_seed_is_resumed_scored_and_compared_like_any_study(seeded: Path) -> None:
    before = numbers(seeded)
    assert run_qatrun("train", "runs/many/seed-1/recipe.yaml", "--resume", cwd=seeded).code == 0
    assert numbers(seeded) == before
    compared = run_qatrun("compare", "bf16", "hif8", "--study", "many/seed-1", "--json", cwd=seeded)
    assert json.loads(compared.out)["arm"] == "hif8"
    assert run_qatrun("eval", "runs/many/seed-0/hif8", "--limit", "5", cwd=seeded).code == 0


def test_a_study_over_seeds_is_told_from_its_seeds(finished: Path) -> None:
    newest = newest_study(finished / "runs")
    assert newest is not None
    assert newest.name == "many"
    ran = run_qatrun("compare", "bf16", "hif8", cwd=finished)
    choices = "--study many/seed-0 or --study many/seed-1"
    assert (ran.code, ran.err) == (
        2,
        f"runs/many holds a study for each of its seeds: compare in one of them, {choices}\n",
    )
    ran = run_qatrun("eval", "runs/many", "--tasks", "demo_facts", cwd=finished)
    arms = "runs/many/seed-0/bf16, runs/many/seed-0/hif8"
    assert (ran.code, ran.err) == (2, f"runs/many is a study; score one of its arms: {arms}\n")


# What the seeds say together.


def test_the_summary_is_of_the_scores_of_the_seeds(finished: Path) -> None:
    study = finished / "runs/many"
    summary = read(study / "seeds.json")
    assert (summary["study"], summary["seeds"]) == ("many", [0, 1])
    files = [study / f"seed-{seed}/comparison.json" for seed in (0, 1)]
    pairs = [read_json(file, StudyComparison).pairs[0] for file in files]
    arm, twin = summary["arms"]["hif8"], summary["arms"]["bf16"]
    assert (arm["twin"], twin["twin"], twin["verdict"], twin["loss_ape_percent"]) == ("bf16", None, None, None)
    for number, task in enumerate(("likes.yaml", "demo_facts")):
        of_seeds = [pair.comparison.tasks[number] for pair in pairs]
        found = arm["tasks"][task]
        assert found["accuracy"] == [each.arm for each in of_seeds]
        assert twin["tasks"][task]["accuracy"] == [each.twin for each in of_seeds]
        assert found["drop_pp"] == pytest.approx([each.drop_pp for each in of_seeds])
        assert found["drop_ci95_seeds_pp"] == pytest.approx(t_interval(found["drop_pp"]))
        assert found["drop_ci95_pp"][0] <= min(found["drop_ci95_seeds_pp"][0], found["drop_ci95_items_pp"][0])
        assert summary["start"]["tasks"][task]["accuracy"] == of_seeds[0].start
    assert arm["loss_ape_percent"]["after_switch"] == pytest.approx(
        [pair.loss_ape_percent["after_switch"] for pair in pairs]
    )
    assert arm["perplexity"] == [pair.perplexity["arm"] for pair in pairs]
    assert arm["all_tasks"]["num_items"] == 120
    assert arm["all_tasks"]["mean"] == pytest.approx(sum(task["mean"] for task in arm["tasks"].values()) / 2)


def test_what_training_lost_is_said_over_seeds_and_counts_where_it_has_a_budget(finished: Path) -> None:
    study = finished / "runs/many"
    folders = {seed: StudyFolder(study / f"seed-{seed}") for seed in (0, 1)}
    recipe = load_recipe(folders[0].recipe)
    said = summarize("many", recipe, folders).arms["hif8"]
    of_seeds = [
        read_json(folder.comparison, StudyComparison).pairs[0].comparison.training for folder in folders.values()
    ]
    drops = [training.drop_pp for training in of_seeds if training is not None]
    assert said.training is not None
    assert said.training.drop_pp == pytest.approx(sum(drops) / 2)
    assert not said.training.asked
    judged = [task.verdict for task in said.tasks.values()] + ([said.text.verdict] if said.text else [])
    assert said.verdict == worst_verdict(judged)
    budget = dict.fromkeys(recipe.budget, 100.0) | {"training": 0.01}
    counted = summarize("many", recipe.model_copy(update={"budget": budget}), folders).arms["hif8"]
    assert counted.training is not None
    assert counted.training.asked
    assert counted.training.ci95_pp == said.training.ci95_pp
    judged = [task.verdict for task in counted.tasks.values()] + ([counted.text.verdict] if counted.text else [])
    assert counted.verdict == worst_verdict([*judged, counted.training.verdict]) != worst_verdict(judged)
    assert f"hif8 lost {said.training.drop_pp:.1f} pp" in (finished / "many.log").read_text(encoding="utf-8")


def test_contrasts_are_paired_over_all_tasks_and_say_what_the_loss_said(finished: Path) -> None:
    summary = read(finished / "runs/many/seeds.json")
    quantization, training = summary["contrasts"]
    assert [(each["name"], each["a"], each["b"]) for each in summary["contrasts"]] == [
        ("quantization", "hif8", "bf16"),
        ("training", "bf16", "start"),
    ]
    pooled = summary["arms"]["hif8"]["all_tasks"]
    assert quantization["per_seed_pp"] == pytest.approx([-drop for drop in pooled["drop_pp"]])
    assert quantization["ci95_seeds_pp"] == pytest.approx([-edge for edge in reversed(pooled["drop_ci95_seeds_pp"])])
    assert quantization["loss_ape_percent"] == summary["arms"]["hif8"]["loss_ape_percent"]["after_switch"]
    assert quantization["answer"].startswith(f"{quantization['effect']}: hif8 is ")
    assert training["loss_ape_percent"] is None
    start = summary["start"]["all_tasks"]["accuracy"]
    accuracies = summary["arms"]["bf16"]["all_tasks"]["accuracy"]
    assert training["per_seed_pp"] == pytest.approx([100 * (accuracy - start) for accuracy in accuracies])


def test_csv_says_the_same(finished: Path) -> None:
    summary = read(finished / "runs/many/seeds.json")
    rows = list(csv.DictReader((finished / "runs/many/seeds.csv").open(encoding="utf-8")))
    assert [(row["kind"], row["name"], row["task"]) for row in rows] == [
        *(("arm", arm, task) for arm in ("bf16", "hif8") for task in ("likes.yaml", "demo_facts", "all tasks")),
        ("contrast", "quantization", "all tasks"),
        ("contrast", "training", "all tasks"),
    ]
    likes, found = rows[3], summary["arms"]["hif8"]["tasks"]["likes.yaml"]
    assert [float(likes[f"effect_pp_seed_{seed}"]) for seed in (0, 1)] == found["drop_pp"]
    assert [float(likes[f"ci95_{edge}_pp"]) for edge in ("low", "high")] == found["drop_ci95_pp"]
    assert likes["answer"] == found["verdict"]
    contrast = rows[6]
    assert (contrast["arm"], contrast["against"], contrast["effect"]) == ("hif8", "bf16", "arm minus against")
    assert float(contrast["effect_mean_pp"]) == summary["contrasts"][0]["difference_pp"]
    assert rows[0]["effect_mean_pp"] == ""


@pytest.mark.parametrize("width", [40, 80, 110])
def test_table_says_which_interval_it_judges_by_and_cuts_no_number(finished: Path, width: int) -> None:
    summary = read_json(finished / "runs/many/seeds.json", Seeds)
    console = Console(width=width, record=True, file=(finished / "table").open("w"))
    console.print(seeds_table(summary))
    text = console.export_text()
    pooled = summary.arms["hif8"].all_tasks
    for edges in (pooled.drop_ci95_pp, pooled.drop_ci95_items_pp, pooled.drop_ci95_seeds_pp):
        assert edges is not None
        assert f"{edges[0]:+.2f} .. {edges[1]:+.2f}" in text
    assert "…" not in text
    words = " ".join(text.split())
    assert "the interval over items and seeds together" in words
    assert "over items (other questions) and over seeds (other runs)" in words
    assert max(map(len, text.splitlines())) <= width


def test_a_study_of_one_seed_answers_contrasts_too(finished: Path) -> None:
    study = finished / "runs/many/seed-1"
    summary, (pair,) = read(study / "seeds.json"), read(study / "comparison.json")["pairs"]
    assert summary["seeds"] == [1]
    for task in pair["comparison"]["tasks"]:
        found = summary["arms"]["hif8"]["tasks"][task["task"]]
        assert found["drop_ci95_pp"] == found["drop_ci95_items_pp"] == pytest.approx(task["ci95_pp"])
        assert (found["sd"], found["drop_ci95_seeds_pp"], found["verdict"]) == (None, None, task["verdict"])
    text = (study / "comparison.txt").read_text(encoding="utf-8")
    assert "\nhif8 against bf16" in text
    assert "quantization" in text.split("contrasts: ")[1]
    assert "One training seed" in text


def test_findings_of_the_diagnoses_are_told_only_of_all_seeds(seeded: Path) -> None:
    study = seeded / "runs/many"
    diagnoses = [read(study / f"seed-{seed}/diagnosis.json")["arms"]["hif8"] for seed in (0, 1)]
    arms = read(study / "seeds.json")["arms"]
    assert arms["hif8"]["findings"] == [diagnosis["findings"] for diagnosis in diagnoses]
    assert arms["bf16"]["findings"] is None
    assert read(study / "seed-1/seeds.json")["arms"]["hif8"]["findings"] == [diagnoses[1]["findings"]]
    (study / "seed-1/diagnosis.json").unlink()
    assert train(seeded, *SEEDS, "--set", "diagnose.at_end=false", "--resume").code == 0
    assert read(study / "seeds.json")["arms"]["hif8"]["findings"] is None


# Resume and refusals.


def test_resume_goes_on_with_the_first_unfinished_seed(seeded: Path) -> None:
    finished = numbers(seeded / "runs/many")
    shutil.rmtree(seeded / "runs")
    with pytest.MonkeyPatch.context() as patch:
        ran = _interrupted_in_second_seed(seeded, patch)
    assert (ran.code, ran.err) == (3, "SIGINT at step 4 of hif8; saved: go on with --resume\n")
    refused = train(seeded, *SEEDS)
    assert refused.code == 2
    assert "runs/many holds a study that is unfinished (--resume to go on with it" in refused.err
    ran = train(seeded, *SEEDS, "--resume")
    assert ran.code == 0, ran.err
    assert [line for line in ran.out.splitlines() if line.endswith("done already") or line.startswith("seed ")] == [
        "seed 0 of 0, 1",
        "bf16: done already",
        "hif8: done already",
        "seed 1 of 0, 1",
        "bf16: done already",
    ]
    assert numbers(seeded / "runs/many") == finished
    assert "finished (--overwrite" in train(seeded, *SEEDS).err


def _interrupted_in_second_seed(folder: Path, patch: pytest.MonkeyPatch) -> Ran:
    started = []

    def stop_the_second_time() -> None:
        started.append(1)
        if len(started) == 2:
            signal.raise_signal(signal.SIGINT)

    interrupt_at(patch, "hif8", 4, stop_the_second_time)
    return train(folder, *SEEDS)


def test_seeds_may_be_added_and_none_removed(seeded: Path) -> None:
    before = {name: digest for name, digest in numbers(seeded / "runs/many").items() if "seed-" in name}
    ran = train(seeded, *SEEDS, "--set", "train.seeds=[0,1,2]", "--resume")
    assert ran.code == 0, ran.err
    after = numbers(seeded / "runs/many")
    assert {name: after[name] for name in before} == before
    summary = read(seeded / "runs/many/seeds.json")
    assert (summary["seeds"], len(summary["contrasts"][0]["per_seed_pp"])) == ([0, 1, 2], 3)
    assert load_recipe(seeded / "runs/many/recipe.yaml").train.seeds == (0, 1, 2)
    refused = train(seeded, *SEEDS, "--set", "train.seeds=[0,2]", "--resume")
    assert refused.code == 2
    assert "train.seeds ([0, 1, 2] -> [0, 2])" in refused.err
    assert "train.seeds ([0, 1, 2] -> None)" in train(seeded, "--set", "name=many", *SHORT, *CONTRASTS, "--resume").err


def test_an_added_arm_changes_no_number_of_the_others(seeded: Path) -> None:
    before = {
        name: digest for name, digest in numbers(seeded / "runs/many").items() if "hif8" in name or "bf16" in name
    }
    ran = train(seeded, *SEEDS, "--set", "arms.int8.qat.format=int8", "--resume")
    assert ran.code == 0, ran.err
    after = numbers(seeded / "runs/many")
    assert {name: after[name] for name in before} == before
    assert list(read(seeded / "runs/many/seeds.json")["arms"]) == ["bf16", "hif8", "int8"]


# Recipes.

MISTAKES = {
    "train.seeds=[]": "train.seeds -- must not be empty",
    "train.seeds=[1, 1]": "train.seeds -- duplicate seed 1",
    "train.seeds=[-1]": "train.seeds[0] -- must be at least 0 (got -1)",
    "train.seeds=3": "train.seeds -- must be a list (got 3)",
    "train={steps: 9, lr_warmup_steps: 0, seed: 4, seeds: [0]}": (
        "train.seed -- seed and seeds exclude each other: give one"
    ),
    "arms.hif8.train.seeds=[0]": "arms.hif8.train.seeds -- is shared by all arms; no arm may change it",
    "contrasts.x=[bf16, hif9]": "contrasts.x -- no such arm 'hif9' (did you mean 'hif8'?)",
    "contrasts.x=[bf16, bf16]": "contrasts.x -- 'bf16' against itself: name two arms",
    "contrasts.x=[bf16]": "contrasts.x -- must be two arms, [a, b] (got 1)",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_mistakes(finished: Path, setting: str) -> None:
    ran = run_qatrun("check", "tiny.yaml", "--set", "warmup.steps=2", "--set", setting, cwd=finished)
    assert (ran.code, ran.err) == (2, f"--set {setting}: {MISTAKES[setting]}\n")


def test_no_arm_has_a_seed_of_its_own_beside_seeds(finished: Path) -> None:
    ran = run_qatrun("check", "tiny.yaml", "--set", "train.seeds=[0]", "--set", "arms.hif8.train.seed=0", cwd=finished)
    message = "arms.hif8.train.seed -- an arm has no seed of its own where train.seeds gives them"
    assert (ran.code, ran.err) == (2, f"--set arms.hif8.train.seed=0: {message}\n")


def test_the_ablation_is_ready_to_run() -> None:
    recipe = load_recipe("ablation")
    checked = preflight(recipe)
    assert checked.problems == []
    assert sum(task.num_items or 0 for task in checked.tasks) >= 1000
    low = {name for name, arm in checked.arms.items() if arm.train.learning_rate == 1e-4}
    assert low == {name for name in recipe.arm_names if "low" in name.split("-")}
    assert {arm.twin for arm in checked.arms.values()} == {None, "bf16-high", "bf16-low"}
    edges = {name: arm.qat.clip for name, arm in checked.arms.items() if arm.qat is not None}
    assert [name for name, clip in edges.items() if clip == "target"] == ["latest-10-low-clip-target"]
    scaling = {name: arm.qat.scaling for name, arm in checked.arms.items() if arm.qat is not None}
    windows = [name for name, how in scaling.items() if (how.algorithm, how.window) == ("max", 64)]
    assert windows == ["max-64-high", "max-64-low"]
    assert all(checked.arms[name].warmup.steps >= 64 for name in low)


def test_openpangu_has_the_arms_and_questions_of_the_ablation_and_the_published_numbers() -> None:
    demo, published = load_recipe("ablation"), load_recipe("ablation-openpangu-1b")
    assert published.arm_names == demo.arm_names
    assert published.contrasts == demo.contrasts
    assert list(published.eval.tasks) == ["mmlu", "hellaswag", "arc_challenge"]
    assert list(published.budget) == [*published.eval.tasks, "perplexity"]
    final = load_recipe("openpangu-1b-hif8").arm_by_name["hif8"]
    arm = published.arm_by_name["max-64-low"]
    assert (arm.model, arm.data, arm.warmup) == (final.model, final.data, final.warmup)
    assert arm.train.model_copy(update={"seeds": None, "keep_last": final.train.keep_last}) == final.train
    assert published.arm_by_name["max-64-high"].train.learning_rate == 1e-4
