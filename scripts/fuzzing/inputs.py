"""What is broken, and which command meets it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzzing.mutate import HUGE, SYNTAX, VALUES, any_fault, byte_fault, tensor_fault, yaml_fault

KEYS = (
    "name", "model.path", "model.revision", "model.compute_dtype", "data.train", "data.train.path",
    "data.train.text_column", "data.valid", "data.seq_len", "data.valid_sequences", "train.steps",
    "train.global_batch_size", "train.micro_batch_size", "train.learning_rate", "train.seed", "train.seeds",
    "train.save_every", "warmup.steps", "qat", "qat.format", "qat.targets", "qat.ignore", "qat.clip", "qat.scaling",
    "qat.scaling.window", "qat.scaling.algorithm", "qat.weight.granularity", "qat.skip_blocks", "qat.modules", "arms",
    "arms.hif8", "arms.hif8.twin", "arms.hif8.qat.start_step", "eval.tasks", "eval.limit", "eval.data_dir",
    "eval.batch_size", "budget", "monitor.probe", "monitor.on_alarm", "contrasts", "diagnose.at_end", "output_dir", "nope",
    "nope.nope",
)  # fmt: skip
OUTPUTS = ("no", "text.jsonl", "runs", "model", "new/er", "x" * 300, "", "code.py")  # may be written to
PATHS = (
    "..",
    "/",
    "no",
    "text.jsonl",
    "runs",
    "runs/tiny",
    "model",
    "~",
    "a\nb",
    "x" * 300,
    "",
    "code.py",
    "likes.yaml",
)
CODE_IN_TASKS = (
    "doc_to_text: !function code.question",
    "process_docs: !function code.question",
    "include: other.yaml",
    "doc_to_text: \"{{ cycler.__init__.__globals__.os.system('touch ../canary') }}\"",
    "doc_to_text: \"{{ (cycler|attr('__in' ~ 'it__')).__globals__ }}\"",
    "metric_list: [{metric: ./code.py}]",
    "task: ../../escape",
    "class: !function code.question",
)


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        arguments: of `qatrun`, run in the world's folder.
        what: what was done to the world.
    """

    kind: str
    arguments: tuple[str, ...]
    what: str


def draw(world: Path, rng: random.Random) -> Input:
    """Break something in the world, and choose a command that meets it."""
    kind = rng.choice(sorted(KINDS))
    arguments, what = KINDS[kind](world, rng)
    return Input(kind, tuple(arguments), what)


def _recipe(world: Path, rng: random.Random) -> tuple[list[str], str]:
    only_looked_at = rng.random() < 0.6
    values = (*VALUES, *HUGE) if only_looked_at else VALUES
    file = world / "tiny.yaml"
    done = byte_fault(file, rng) if rng.random() < 0.15 else yaml_fault(file, rng, values)
    return (["check", "tiny.yaml"] if only_looked_at else _train(rng)), f"tiny.yaml: {done}"


def _set(world: Path, rng: random.Random) -> tuple[list[str], str]:
    options = []
    for _ in range(rng.choice((1, 1, 2))):
        value = rng.choice((*VALUES, *HUGE, *SYNTAX[:4], *PATHS))
        text = value if isinstance(value, str) else json.dumps(value)
        options += ["--set", rng.choice(("{key}={value}", "{key}={value}", "{key}", "={value}")).format(
            key=rng.choice(KEYS), value=text.replace("\x00", "")
        )]  # fmt: skip
    return ["check", "tiny.yaml", *options], " ".join(options)


def _data(world: Path, rng: random.Random) -> tuple[list[str], str]:
    file = world / rng.choice(("text.jsonl", "text.jsonl", "valid.txt", "questions/me/likes/test.parquet"))
    done = any_fault(file, rng)
    name = file.name
    if file.name == "text.jsonl" and file.is_file() and rng.random() < 0.3:
        name = f"text{rng.choice(('.txt', '.json', '.parquet', '.csv', '.jsonl.gz', '.jsonl.zst', '.bin', ''))}"
        file.rename(world / name)
        recipe = world / "tiny.yaml"
        recipe.write_text(recipe.read_text().replace("path: text.jsonl", f"path: {name}"))
    return rng.choice((["check", "tiny.yaml"], _train(rng), ["inspect", "model", "--data", name])), f"{name}: {done}"


def _model(world: Path, rng: random.Random) -> tuple[list[str], str]:
    file = rng.choice(sorted(path for path in (world / "model").iterdir() if path.is_file()))
    if rng.random() < 0.15:
        config = json.loads((world / "model/config.json").read_text())
        config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        config["model_type"] = rng.choice((config["model_type"], "mine"))
        (world / "model/config.json").write_text(json.dumps(config))
        (world / "model/code.py").write_text((world / "code.py").read_text())
        done, name = "code of its own", "model"
    else:
        done, name = any_fault(file, rng), f"model/{file.name}"
    return rng.choice(
        (
            *(["check", "tiny.yaml"], _train(rng), ["eval", "model", *_TASK], ["init", "model"]),
            *(["sensitivity", "tiny.yaml"], ["inspect", "model", "--data", "text.jsonl"]),
        )
    ), f"{name}: {done}"


def _quantized(world: Path, rng: random.Random) -> tuple[list[str], str]:
    folder = world / "runs/tiny/hif8/quantized"
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    done = tensor_fault(file, rng) if file.suffix == ".safetensors" else any_fault(file, rng)
    path = rng.choice(("runs/tiny/hif8", "runs/tiny/hif8/quantized"))
    return ["eval", path, *_TASK, "--limit", "2"], f"{file.relative_to(world)}: {done}"


def _study(world: Path, rng: random.Random) -> tuple[list[str], str]:
    study = world / "runs/tiny"
    file = rng.choice(sorted(path for path in study.rglob("*") if path.is_file() and "quantized" not in path.parts))
    done = any_fault(file, rng)
    verbs = (
        ["compare", "bf16", "hif8"],
        ["compare", "bf16", "hif8", rng.choice(("--json", "--csv", "--anyway", "--strict"))],
        ["report", "tiny"],
        ["diagnose", "tiny"],
        ["eval", "runs/tiny/bf16", "--limit", "2"],
        ["train", "tiny.yaml", "--resume"],
        ["train", "tiny.yaml", "--overwrite"],
        ["train", "tiny.yaml"],
    )
    return rng.choice(verbs), f"{file.relative_to(world)}: {done}"


def _task(world: Path, rng: random.Random) -> tuple[list[str], str]:
    file = world / "likes.yaml"
    (world / "other.yaml").write_text(file.read_text().replace('"{{query}}"', "!function code.question"))
    if rng.random() < 0.5:
        line = rng.choice(CODE_IN_TASKS)
        key = line.partition(":")[0]
        lines = [other for other in file.read_text().splitlines() if not other.startswith((f"{key}:", "  - metric"))]
        file.write_text("\n".join([line, *lines]) + "\n")
        done = line
    else:
        done = yaml_fault(file, rng)
    return rng.choice((["check", "tiny.yaml"], _train(rng), ["eval", "model", *_TASK])), f"likes.yaml: {done}"


def _command(world: Path, rng: random.Random) -> tuple[list[str], str]:
    """Names and numbers of the command line itself."""
    path, more, output = rng.choice(PATHS), rng.choice(PATHS), rng.choice(OUTPUTS)
    number = rng.choice(("0", "-1", "x", "1e9", "9" * 30))
    verbs = (
        ["check", path],
        ["eval", path, "--tasks", more],
        ["eval", "model", *_TASK, "--output", output],
        ["eval", "model", *_TASK, "--limit", number],
        ["eval", "model", *_TASK, "--num-fewshot", number],
        ["compare", path, more],
        ["compare", "bf16", "hif8", "--study", path, "--output-dir", more],
        ["compare", "bf16", "hif8", "--budget", f"{more}={number}"],
        ["diagnose", path],
        ["sensitivity", path],
        ["sensitivity", "tiny.yaml", "--budget", number, "--output", output],
        ["inspect", path, "--data", more],
        ["inspect", "model", "--data", "text.jsonl", "--sequences", number, "--output", output],
        ["report", path, "--output-dir", more],
        ["init", path, "--output", output],
        ["train", path, "--resume"],
        ["train", "tiny.yaml", "--set", f"output_dir={output}"],
        [path],
    )
    arguments = rng.choice(verbs)
    return arguments, "the command line"


_TASK = ("--tasks", "likes.yaml", "--data-dir", "questions")


def _train(rng: random.Random) -> list[str]:
    return ["train", "tiny.yaml", "--set", "name=new", "--set", f"diagnose.at_end={rng.choice(('true', 'false'))}"]


KINDS: dict[str, Callable[[Path, random.Random], tuple[list[str], str]]] = {
    "recipe": _recipe,
    "set": _set,
    "data": _data,
    "model": _model,
    "quantized": _quantized,
    "study": _study,
    "task": _task,
    "command": _command,
}
