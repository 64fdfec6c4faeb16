"""The other verbs as a user types them: what they print, what they refuse, and with which exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tiny_world import run_qatrun

from qatrun.recipe import load_recipe

LIKES = "likes.yaml"


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def accuracy(scored: dict[str, Any], task: str = LIKES) -> float:
    return next(entry["accuracy"] for entry in scored["tasks"] if entry["name"] == task)


# What is wrong is said in a line, without a traceback, and nothing is written.

NO_MODEL = "no model folder 'nope' here, and the hub did not give one (offline: HF_HUB_OFFLINE is set)"
NO_BUDGET = "must be TASK=PP, PP a positive number of percentage points"
NO_TASK = "no such task (scored: likes.yaml, demo_facts, perplexity)"
MISTAKES = {
    "train nope.yaml": "nope.yaml: no such file",
    "train dem": "no file or shipped recipe named 'dem' (did you mean 'demo'?)",
    "train tiny.yaml --set name": "--set name: must be key.path=value",
    "train tiny.yaml --set qat.clip=8": "--set qat.clip=8: qat.clip -- unknown clip 8 (one of format, target)",
    "train demo --set model.path=nope": f"--set model.path=nope: model.path -- {NO_MODEL}",
    "train demo --set model.path=runs": "--set model.path=runs: model.path -- folder 'runs' holds no config.json",
    "check": "name a recipe to check, or give --schema",
    "check tiny.yaml --hardware h10": "--hardware h10: no such name (did you mean 'h100'?)",
    "train tiny.yaml --set target.hardware=a10o": "--set target.hardware=a10o: target.hardware -- unknown hardware 'a10o' "
    "(did you mean 'a10'?)",
    "eval nope --tasks likes.yaml": NO_MODEL,
    "eval runs --tasks likes.yaml": "folder 'runs' holds no config.json",
    "eval runs/tiny --tasks demo_facts": "runs/tiny is a study; score one of its arms: runs/tiny/bf16, runs/tiny/hif8",
    "eval model --tasks demo_fact": "eval.tasks.demo_fact -- unknown task 'demo_fact' (did you mean 'demo_facts'?)",
    "eval model --tasks no.yaml": "eval.tasks.no.yaml -- no such file: no.yaml",
    "eval model --tasks ,": "--tasks names no task",
    "compare bf16": "compare bf16 with what? Name a second arm, or none for all arms of the study",
    "compare --format tex": "--format tex: no such name (did you mean 'text'?)",
    "clean nope": "no study 'nope' in runs (one of ruined, tiny)",
    "clean tiny": "nobody to ask here: give --yes",
    "compare bf16 int8": "runs/ruined has no scores of int8 (it has bf16, ruined, start)",
    "compare bf16 int8 --study tiny": "runs/tiny has no scores of int8 (it has bf16, hif8, start)",
    "compare bf16 hif8 --study tinny": "no study 'tinny' in runs (did you mean 'tiny'?)",
    "compare bf16 bf16": "bf16 beside itself says nothing: name two arms, or two folders",
    "compare bf16 hif8 --output-dir model": "no study in model yet",
    "compare bf16 ruined --budget likes=1": f"--budget likes=1: {NO_TASK}",
    "compare bf16 ruined --budget likes.yaml": f"--budget likes.yaml: {NO_TASK}",
    "compare bf16 ruined --budget demo_facts=x": f"--budget demo_facts=x: {NO_BUDGET}",
    "compare bf16 ruined --budget demo_facts=nan": f"--budget demo_facts=nan: {NO_BUDGET}",
    "compare bf16 ruined --budget demo_facts=-1": f"--budget demo_facts=-1: {NO_BUDGET}",
    "compare bf16 ruined --json --csv": "--json, --csv and --format exclude each other",
    "compare model runs/tiny/hif8": "model/eval: no scores here (scores.json and items.parquet belong together)",
    "export nope": "'nope' is no quantized arm (no quantized/plan.json)",
    "export runs/tiny": "'runs/tiny' is no quantized arm (no quantized/plan.json)",
    "export runs/tiny/bf16": "'runs/tiny/bf16' is no quantized arm (no quantized/plan.json)",
    "export runs/tiny/hif8 --to compressed": "--to compressed: no such name (did you mean 'compressed-tensors'?)",
    "export runs/tiny/hif8 --to compressed-tensors": "runs/tiny/hif8 --to compressed-tensors -- compressed-tensors has no "
    "hif8, its 8-bit float is E4M3 (--to hif8 keeps it, or train fp8_e4m3)",
    "export runs/ruined/ruined --output model": "model holds something that qatrun did not export; give another --output",
    "eval model --engine vlm": "--engine vlm: no such name (did you mean 'vllm'?)",
    "eval model --tasks demo_facts --engine transformers --text text.jsonl": "--text: a text is read by models of ours and "
    "plain ones, not in an engine",
    "eval model --engine vllm": "engine vllm: vllm is not installed (pip install vllm)",
    "export runs/tiny/hif8 --to onnx --layout ascend": "--to and --layout onnx-ascend: no such name (did you mean "
    "'hif8-ascend'?)",
    "init model --output tiny.yaml": "tiny.yaml exists already; give another --output",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(trained_world: Path, command: str) -> None:
    before = files(trained_world)
    ran = run_qatrun(*command.split(), cwd=trained_world)
    assert (ran.code, ran.err) == (2, MISTAKES[command] + "\n")
    assert files(trained_world) == before


@pytest.mark.parametrize("command", ["nope", "train", "train tiny.yaml --resum", "eval model --limit 0"])
def test_a_wrong_command_line_shows_its_usage(trained_world: Path, command: str) -> None:
    ran = run_qatrun(*command.split(), cwd=trained_world)
    assert ran.code == 2
    assert ran.err.startswith("Usage: qatrun")
    assert "Traceback" not in ran.err


def test_what_the_system_refuses_is_one_line_and_exit_code_2(trained_world: Path) -> None:
    ran = run_qatrun("train", "tiny.yaml", "--set", "output_dir=tiny.yaml", cwd=trained_world)
    assert (ran.code, ran.err) == (2, "tiny.yaml/tiny: Not a directory\n")


def test_few_shot_examples_that_are_scored_too_are_refused(trained_world: Path) -> None:
    ran = run_qatrun("eval", "model", "--tasks", LIKES, "--num-fewshot", "2", cwd=trained_world)
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith(
        "eval.tasks.likes.yaml -- 60 of the 60 few-shot examples in split 'test' are also scored items of 'likes'"
    )


def test_a_tokenizer_that_cannot_be_read_is_known_before_weights_are(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qatrun.export.artifact.StoredTensors", None)
    monkeypatch.setattr("qatrun.study.joint.load_model", None)
    for folder in ("model", "runs/tiny/hif8/quantized"):
        (world / folder / "tokenizer.json").write_text("[]", encoding="utf-8")
        ran = run_qatrun("eval", folder, "--tasks", "demo_fact", cwd=world)
        assert ran.code == 2
        first, second = ran.err.splitlines()
        assert first.startswith(f"{folder}: no tokenizer: its files are damaged, or of a newer version (")
        assert second == MISTAKES["eval model --tasks demo_fact"]


# help


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    assert run_qatrun("--version", cwd=tmp_path) == (0, f"qatrun {version('qatrun')}\n", "")


@pytest.mark.parametrize(
    ("command", "heavy"),
    [("--help", {"torch", "transformers", "datasets", "pydantic"}), ("studies", {"torch", "transformers", "datasets"})],
)
def test_what_needs_nothing_heavy_imports_nothing_heavy(command: str, heavy: set[str], trained_world: Path) -> None:
    program = f"import sys; from qatrun import cli; sys.argv = ['qatrun', '{command}']\ntry: cli.main()\n"
    program += f"finally: print(sorted({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=trained_world, capture_output=True, text=True, check=True)
    assert command != "studies" or "tiny" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "[]"


def test_check_imports_neither_training_nor_scoring() -> None:
    """Seconds without a clock. Transformers' models themselves import accelerate and torch.distributed.tensor."""
    unneeded = ["lm_eval", "qatrun.export.artifact", "qatrun.data.documents", "qatrun.evaluate.harness"]
    unneeded += ["qatrun.evaluate.tasks", "qatrun.study.runner", "qatrun.study.scoring", "qatrun.train.loop"]
    program = "import sys; from qatrun import cli; sys.argv = ['qatrun', 'check', 'demo']\ntry: cli.main()\n"
    program += f"finally: print(sorted(set({unneeded}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("demo: builtin:demo, ")
    assert ran.stdout.splitlines()[-1] == "[]"


# check


def test_check_prints_what_would_happen_and_writes_nothing(trained_world: Path) -> None:
    before = files(trained_world)
    ran = run_qatrun("check", "tiny.yaml", "--set", "name=other", cwd=trained_world)
    assert (ran.code, ran.err) == (0, "")
    assert files(trained_world) == before
    lines = [line.rstrip() for line in ran.out.splitlines()]
    assert lines[0] == "other: model, 21,824 parameters -> runs/other"
    assert lines[1].startswith("runs on ")
    assert lines[3:6] == [
        "bf16",
        "  steps 1-40 BF16, the first 10 in the shared trunk",
        "  lr 0.05; 128 tokens a step, 5,120 in all: about 2.4 passes over the text",
    ]
    assert lines[8:14] == [
        "hif8 (twin: bf16)",
        "  steps 1-10 BF16, switch, steps 11-40 QAT",
        "  lr 0.05; 128 tokens a step, 5,120 in all: about 2.4 passes over the text",
        "  weight hif8 per_tensor, amax to 15, delayed max over 4",
        "  input hif8 per_tensor, amax to 15, delayed max over 4",
        "  14 of 15 linears, 85% of linear FLOPs quantized",
    ]
    assert lines[14].startswith("  memory, about: bf16 training ")
    assert "qat training" in lines[14]
    assert lines[15].startswith("disk, about: ")
    assert lines[17].split() == ["task", "shots", "metric", "items", "budget", "pp", "detects", "pp", "source"]
    assert lines[19].split()[:5] == ["demo_facts", "0", "acc", "60", "1"]
    assert lines[19].split()[-1] == "builtin"
    assert "detects: smallest drop seen at 80% power if 5% of the items flip" in lines
    assert lines[-1] == "demo_facts: 60 items cannot judge a budget of 1 pp; about 9,489 could"


def test_check_as_json_agrees_with_the_recipe(trained_world: Path) -> None:
    plan = json.loads(run_qatrun("check", "tiny.yaml", "--json", cwd=trained_world).out)
    assert plan["problems"] == []
    assert [(arm["name"], arm["twin"], arm["switch_step"]) for arm in plan["arms"]] == [
        ("bf16", None, None),
        ("hif8", "bf16", 10),
    ]
    assert [(task["name"], task["num_items"]) for task in plan["tasks"]][1] == ("demo_facts", 60)


FAULTY = """\
extends: parent.yaml
name: faulty
data: {train: {path: text.jsonl}}
eval:
  tasks:
    likes.yaml: 0
    gone.yaml: 0
arms:
  bf16: {qat: null}
  hif8:
    qat:
      targets: ["re:.*\\\\.mpl\\\\..*"]
  int8:
    data: {train: {text_column: txet}}
    qat: {format: int8}
"""


def test_all_that_model_and_data_show_is_reported_at_once_with_its_line(world: Path) -> None:
    parent = (world / "tiny.yaml").read_text(encoding="utf-8").replace("  scaling:", "  ignore: [lm_hed]\n  scaling:")
    (world / "parent.yaml").write_text(parent, encoding="utf-8")
    (world / "faulty.yaml").write_text(FAULTY, encoding="utf-8")
    line = {text.split(":")[0].strip(): number for number, text in enumerate(parent.splitlines(), start=1)}
    override = "--set data.valid={path: no.txt}"
    before = files(world)
    for verb in ("check", "train"):
        ran = run_qatrun(verb, "faulty.yaml", *override.split(" ", 1), cwd=world)
        assert ran.code == 2
        assert ran.err.splitlines() == [
            "faulty.yaml:7: eval.tasks.gone.yaml -- no such file: gone.yaml",
            "faulty.yaml:12: arms.hif8.qat.targets -- pattern 're:.*\\.mpl\\..*' matches no linear "
            "(names look like 'model.layers.0.self_attn.q_proj')",
            "faulty.yaml:13: arms.int8.twin -- its twin 'bf16' has other data: name a twin that does not, or add one",
            "faulty.yaml:14: arms.int8.data.train.text_column -- no column 'txet' in text.jsonl (did you mean 'text'?)",
            f"parent.yaml:{line['ignore']}: qat.ignore -- pattern 'lm_hed' matches no linear (did you mean 'lm_head'?)",
            f"{override}: data.valid.path -- no such file 'no.txt'",
        ]
    assert files(world) == before


def test_schema_is_a_json_schema(tmp_path: Path) -> None:
    ran = run_qatrun("check", "--schema", cwd=tmp_path)
    schema = json.loads(ran.out)
    assert ran.code == 0
    assert schema["additionalProperties"] is False
    assert {"extends", "model", "data", "train", "qat", "arms", "eval"} <= schema["properties"].keys()
    references = {part.split('"')[0] for part in ran.out.split('"#/$defs/')[1:]}
    assert references == schema["$defs"].keys()


# recipes, init


def test_recipes_are_listed_one_to_a_line(tmp_path: Path) -> None:
    ran = run_qatrun("recipes", cwd=tmp_path)
    names = [line.split()[0] for line in ran.out.splitlines()]
    assert {"demo", "local-model", "openpangu-1b-hif8"} <= set(names)
    for name in names:
        load_recipe(name)


def test_init_writes_a_recipe_that_check_takes(world: Path) -> None:
    ran = run_qatrun("init", "model", cwd=world)
    assert ran == (
        0,
        "wrote model.yaml; next: name your text at data.train.path, then qatrun check model.yaml --time\n",
        "",
    )
    assert load_recipe(world / "model.yaml").model.path == "model"
    overrides = ["data.train.path=text.jsonl", "data.seq_len=16", "eval.tasks={likes.yaml: 0}", "budget={}"]
    assert run_qatrun("init", "model", "--data", "text.jsonl", "--output", "mine.yaml", cwd=world).code == 0
    assert load_recipe(world / "mine.yaml").data.train.path == "text.jsonl"
    checked = run_qatrun("check", "model.yaml", *(part for text in overrides for part in ("--set", text)), cwd=world)
    assert (checked.code, checked.err) == (0, "")


def test_how_long_it_takes_is_said_where_benchmarks_alone_are_missing(world: Path) -> None:
    ran = run_qatrun("init", "model", "--data", "text.jsonl", "--output", "timed.yaml", "--time", cwd=world)
    assert (ran.code, ran.out.split("\n", 1)[0]) == (2, "wrote timed.yaml")
    assert "timed.yaml:14: data.valid_sequences -- text.jsonl fills 4 sequences of 512 tokens" in ran.err
    ran = run_qatrun("check", "timed.yaml", "--time", "--set", "data.seq_len=16", cwd=world)
    assert "timed.yaml:43: eval.tasks.hellaswag -- no data" in ran.err
    assert "passes over the text" in ran.out
    assert "training takes about " in ran.out


def test_init_makes_the_folder_it_writes_to_and_overwrites_nothing(world: Path) -> None:
    assert run_qatrun("init", ".", "--output", "my/recipes/x.yaml", cwd=world).code == 0
    written = (world / "my/recipes/x.yaml").read_text(encoding="utf-8")
    assert run_qatrun("init", "model", "--output", "my/recipes/x.yaml", cwd=world).code == 2
    assert (world / "my/recipes/x.yaml").read_text(encoding="utf-8") == written


# eval


@pytest.mark.parametrize(
    ("path", "who", "shown"),
    [
        ("model", "start", "model (plain model, float32)"),
        ("runs/tiny/bf16", "twin", "runs/tiny/bf16 (plain model, float32)"),
        ("runs/tiny/hif8", "arm", "runs/tiny/hif8/quantized (quantizers on, scales frozen)"),
        ("runs/tiny/hif8/quantized", "arm", "runs/tiny/hif8/quantized (quantizers on, scales frozen)"),
    ],
)
def test_eval_gives_the_score_of_the_study(trained_world: Path, path: str, who: str, shown: str) -> None:
    options = ("--tasks", LIKES, "--limit", "60", "--batch-size", "60", "--json")
    ran = run_qatrun("eval", path, *options, cwd=trained_world)
    assert ran.code == 0, ran.err
    scored = json.loads(ran.out)
    (pair,) = json.loads((trained_world / "runs/tiny/comparison.json").read_text(encoding="utf-8"))["pairs"]
    assert accuracy(scored) == pair["comparison"]["tasks"][0][who]
    assert scored["model"] == shown


def test_eval_of_an_arm_takes_the_settings_of_its_study(trained_world: Path) -> None:
    scored = json.loads(run_qatrun("eval", "runs/tiny/bf16", "--json", cwd=trained_world).out)
    assert [(task["name"], task["num_items"]) for task in scored["tasks"]] == [(LIKES, 60), ("demo_facts", 60)]
    assert scored["settings"]["batch_size"] == 40


def test_eval_prints_a_table(trained_world: Path) -> None:
    ran = run_qatrun("eval", "model", "--tasks", f"demo_facts, {LIKES}", "--limit", "5", cwd=trained_world)
    assert ran.code == 0
    title, header, facts, likes = ran.out.splitlines()
    assert title.rstrip() == "model (plain model, float32)"
    assert header.split() == ["task", "shots", "metric", "items", "accuracy"]
    assert facts.split()[:4] == ["demo_facts", "0", "acc", "5"]
    assert likes.split()[:4] == [LIKES, "0", "acc", "5"]


def test_names_with_markup_in_them_are_printed_as_they_are(world: Path) -> None:
    shutil.copy(world / LIKES, world / "[red]x.yaml")
    shutil.copytree(world / "model", world / "[b]m")
    ran = run_qatrun("eval", "[b]m", "--tasks", "[red]x.yaml", "--limit", "2", cwd=world)
    assert ran.code == 0
    assert "[b]m (plain model, float32)" in ran.out
    assert "[red]x.yaml" in ran.out
    assert "scoring [b]m" in ran.err


def test_a_line_number_is_not_an_emoji(world: Path) -> None:
    (world / "long.yaml").write_text("#\n" * 99 + "nam: x\n", encoding="utf-8")
    assert "long.yaml:100: nam -- unknown key" in run_qatrun("check", "long.yaml", cwd=world).err
