"""Plant faults in runs of the demo, and see whether alarms and diagnosis find them, and nothing else.

    python scripts/fault_bench.py --seed 0 --output /tmp/faults       one seed: 26 cells, about 25 minutes on one core
    python scripts/fault_bench.py --summary --output /tmp/faults      the confusion matrix over the seeds there; faults.csv
    python scripts/fault_bench.py --healthy 10 --output /tmp/faults   alarms of the demo's HiF8 arm over 10 seeds, unscored

Planted, each in hif8, fp8_e4m3 and int8:

    none      nothing
    lr        a learning rate of 3e-3, which forgets
    scale     every scale estimate 8 times too small, values clipped at the target
    lag       the same, but HiF8's own range as the edge (in hif8 only: elsewhere that is the target)
    both      lr and scale
    burst     the latest amax, renewed every 10 steps, on data whose every tenth batch, the one it is renewed after, says one
              word over and over, which moves the model's insides less; values clipped at the target
    rare      the same with two such batches in all, the later one before the last renewal
    outlier   one channel in eight before each attention and MLP block 64 times as large, undone in the weights that read
              it: the same function

A fault that does no harm is no fault. The rule that labels a cell uses no item that the diagnosis looks at. It was written
down before seeds 3 to 5 were run; seeds 0 to 2 are where it and the thresholds of the diagnosis were found, so they prove
nothing. Fault and measure, either is enough:

    lr, both         forgetting, if training without quantizers (the twin) raises the log-perplexity of held-out text of the
                     pretraining kind by 0.05 a token over the start model's, or costs the right answers to other questions
                     than those that are scored 0.10 of their log-likelihood an answer
    scale, lag,      saturation, if quantization (the arm with quantizers on against its twin) costs 0.02 a token of
    both, burst,     held-out text, or 0.04 an answer to those questions, more than it costs the same format without a fault
    rare
    outlier          resolution, by the same measure

How mild a fault may be is asked in hif8 only, apart from the matrix: a rule of thresholds and one of intervals must disagree
somewhere near the threshold. lr-3e-4 and lr-1e-3 are lr, scale-2x and scale-4x are scale, by less.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qatrun import demo
from qatrun.data import IGNORE_INDEX, open_data, open_probe
from qatrun.evaluate.text import mean_nll
from qatrun.export import artifact
from qatrun.files import read_json, write_json
from qatrun.layout import StudyFolder
from qatrun.model import DTYPES, load_model, save_model
from qatrun.numerics import bfloat16_products, inverse_scale
from qatrun.quant import Scales
from qatrun.recipe import Arm, ModelConfig, Recipe, load_recipe, parse_recipe
from qatrun.recipe.document import deep_merge
from qatrun.records.diagnosis import ArmDiagnosis
from qatrun.report import TerminalDisplay
from qatrun.study import preflight, run_study
from qatrun.study.claim import claimed
from qatrun.study.diagnose import diagnose
from qatrun.study.display import Display
from qatrun.study.records import first_alarms
from qatrun.study.segments import plan_segments
from qatrun.tokenizer import load_tokenizer
from qatrun.train.loop import Session
from qatrun.train.metrics import read_alarms
from qatrun.train.segment import Segment, Watched
from qatrun.train.signals import stop_on_signals

FORMATS = ("hif8", "fp8_e4m3", "int8")
PLANTED = {
    "none": (),
    "lr": ("forgetting",),
    "scale": ("saturation",),
    "lag": ("saturation",),
    "both": ("forgetting", "saturation"),
    "burst": ("saturation",),
    "rare": ("saturation",),
    "outlier": ("resolution",),
    "lr-3e-4": ("forgetting",),
    "lr-1e-3": ("forgetting",),
    "scale-2x": ("saturation",),
    "scale-4x": ("saturation",),
}
UNDERESTIMATE = {"scale": 8, "lag": 8, "both": 8, "scale-2x": 2, "scale-4x": 4}
HOT = {"": 3e-3, "-3e-4": 3e-4, "-1e-3": 1e-3}
MILD = ("lr-3e-4", "lr-1e-3", "scale-2x", "scale-4x")
# Nats a token of text, nats an answer.
HARM = {"forgetting": (0.05, 0.10), "saturation": (0.02, 0.04), "resolution": (0.02, 0.04)}
OUTLIER, EVERY_CHANNEL, BURST_EVERY = 64.0, 8, 10
STEPS, WARMUP, BATCH, SEQ_LEN = 80, 20, 16, 128
# The first amax is pushed in the last step before the switch, so renewals follow the steps that end in 8.
QUIET_STEPS = {"burst": range((WARMUP + BURST_EVERY - 2) % BURST_EVERY, STEPS, BURST_EVERY), "rare": (48, 78)}
QUIET_WORDS = ("legs", "glue", "oats", "rain")  # of all, those that leave the largest activations smallest
SCORED, ASKED = 150, 400  # items a task: the first are the diagnosis's, of the others some are for the rule
AT_TARGET = {"clip": "target"}


def recipe_of(name: str, seed: int, output: Path, arms: Mapping[str, Any], **sections: Any) -> Recipe:
    """The demo, shortened, with other arms."""
    shortened = {
        "name": name,
        "output_dir": str(output / f"seed-{seed}"),
        "train": {"steps": STEPS, "lr_warmup_steps": 10, "seed": seed, "save_every": STEPS},
        "warmup": {"steps": WARMUP},
        "qat": {"scaling": {"window": WARMUP}},
        "monitor": {"probe": {"every": 10}, "sqnr_every": 10},
        "diagnose": {"at_end": False, "calibration_sequences": 32},
        "eval": {"limit": SCORED},
    }
    shared = load_recipe("demo").model_dump(mode="json", exclude={"arms"})
    return parse_recipe(deep_merge(deep_merge(shared, shortened), sections) | {"arms": dict(arms)})


def main_recipe(seed: int, output: Path) -> Recipe:
    """Every fault that needs neither another model nor other data; the trunks are shared."""
    arms: dict[str, Any] = {"bf16": {"qat": None}}
    hot = {dose: {"learning_rate": rate} for dose, rate in HOT.items()}
    arms |= {f"bf16-lr{dose}": {"qat": None, "train": train} for dose, train in hot.items()}
    for format in FORMATS:
        arms[f"{format}-none"] = {"twin": "bf16", "qat": {"format": format}}
        arms[f"{format}-lr"] = {"twin": "bf16-lr", "qat": {"format": format}, "train": hot[""]}
        arms[f"{format}-scale"] = {"twin": "bf16", "qat": {"format": format, **AT_TARGET}}
        arms[f"{format}-both"] = {"twin": "bf16-lr", "qat": {"format": format, **AT_TARGET}, "train": hot[""]}
    arms["hif8-lag"] = {"twin": "bf16", "qat": {"format": "hif8", "clip": "format"}}
    for dose in ("-3e-4", "-1e-3"):
        arms[f"hif8-lr{dose}"] = {"twin": f"bf16-lr{dose}", "qat": {"format": "hif8"}, "train": hot[dose]}
    for dose in ("-2x", "-4x"):
        arms[f"hif8-scale{dose}"] = {"twin": "bf16", "qat": {"format": "hif8", **AT_TARGET}}
    return recipe_of("main", seed, output, arms)


def burst_recipe(fault: str, seed: int, output: Path) -> Recipe:
    """The latest amax, ten steps old, on bursty data."""
    scaling = {"algorithm": "most_recent", "window": 1, "update_interval": BURST_EVERY}
    arms: dict[str, Any] = {"bf16": {"qat": None}}
    arms |= {f"{format}-{fault}": {"qat": {"format": format, "scaling": scaling, **AT_TARGET}} for format in FORMATS}
    text = write_bursty_text(output / f"{fault}-{seed}.jsonl", QUIET_STEPS[fault], seed)
    return recipe_of(fault, seed, output, arms, data={"train": {"path": str(text), "split": "train", "shuffle": False}})


def outlier_recipe(seed: int, output: Path) -> Recipe:
    """The start model with planted outlier channels."""
    arms: dict[str, Any] = {"bf16": {"qat": None}}
    arms |= {f"{format}-outlier": {"qat": {"format": format}} for format in FORMATS}
    return recipe_of("outlier", seed, output, arms, model={"path": str(write_outlier_model(output / "outlier-model"))})


def write_bursty_text(file: Path, quiet_steps: Iterable[int], seed: int) -> Path:
    """Stories, but in the batches of these steps one word alone. It is read in order, and the seed chooses stories and
    word: nothing else of this text depends on it."""
    tokenizer = load_tokenizer(ModelConfig(path=demo.BUILTIN))
    stories = islice(demo.documents("finetune"), 8_000 * (seed % 4) + 2_000 * (seed // 4), None)
    word = QUIET_WORDS[(seed + seed // 4) % len(QUIET_WORDS)]

    def num_tokens(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"]) + 1  # its end

    rows: list[str] = []
    written = 0
    for step in quiet_steps:
        while written + num_tokens(story := next(stories)) < step * BATCH * SEQ_LEN:
            rows.append(story)
            written += num_tokens(story)
        filling = (step + 1) * BATCH * SEQ_LEN - written
        rows.append(" ".join([word] * (filling - 1)))
        assert num_tokens(rows[-1]) == filling, f"{word!r} is not one token"
        written += filling
    rows += islice(stories, 1_000)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return file


def write_outlier_model(folder: Path) -> Path:
    """The demo's model with some channels of each norm's output scaled up, and the weights that read them down."""
    if (folder / "config.json").is_file():
        return folder
    source = ModelConfig(path=demo.BUILTIN)
    model = load_model(source, torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[::EVERY_CHANNEL] *= OUTLIER
                for reader in readers:
                    reader.weight[:, ::EVERY_CHANNEL] /= OUTLIER
    save_model(model, load_tokenizer(source), folder, torch.float32)
    return folder


def train_planted(recipe: Recipe, display: Display) -> None:
    """Train the arms whose name asks for scales that are too small; the study then finds them trained."""
    checked, folder = preflight(recipe), StudyFolder(Path(recipe.output_dir) / recipe.name)
    with claimed(folder, recipe, resume=True, overwrite=False, warn=display.on_warning):
        for segments in plan_segments(checked.arms, checked.plans, folder.path):
            factor = UNDERESTIMATE.get(segments.own.arm.name.partition("-")[2])
            if factor is not None and segments.trunk is not None:
                train_segment(segments.trunk, display)
                train_segment(segments.own, display, factor)


def train_segment(segment: Segment, display: Display, factor: int = 1) -> None:
    """Train a segment as a study does, with scale estimates that many times too small."""
    arm, tokenizer = segment.arm, load_tokenizer(segment.arm.model)
    assert arm.monitor.probe is not None
    model = load_model(arm.model, DTYPES[arm.model.param_dtype])
    stream = open_data(arm.data, tokenizer, arm.train.seed).train
    watched = Watched(open_probe(arm.data, tokenizer, arm.monitor.probe.sequences))
    display.begin_training(segment.name, arm.warmup.steps if segment.trunk is not None else 0, segment.last_step)
    with bfloat16_products(), stop_on_signals() as request:
        session = Session(segment, model, stream, display, (), watched)
        if session.quant is not None:
            underestimate(session.quant.scales, factor)
        session.run(request)


def underestimate(scales: Scales, factor: int) -> None:
    """Divide every scale by a factor, a power of two, whenever it moves."""
    move = scales.move

    def moved(which: Tensor) -> None:
        before = scales.scale
        move(which)
        scales.scale = torch.where(scales.scale == before, before, scales.scale / factor)
        scales.inv_scale = inverse_scale(scales.scale)

    scales.move = moved  # type: ignore[method-assign]


def run_seed(seed: int, output: Path) -> None:
    """Train, score, label and diagnose every cell of a seed; writes cells.json."""
    cells: list[dict[str, Any]] = []
    with TerminalDisplay(Console()) as display:
        bursts = (burst_recipe(fault, seed, output) for fault in QUIET_STEPS)
        for recipe in (main_recipe(seed, output), *bursts, outlier_recipe(seed, output)):
            train_planted(recipe, display)
            folder = StudyFolder(run_study(recipe, display, resume=True).folder)
            found = diagnose(folder, display).arms
            measure = Measure(folder, recipe)
            cells += [
                cell_of(folder, recipe.arm_by_name[name], result, measure, seed) for name, result in found.items()
            ]
    healthy = {cell["format"]: cell["harm"]["quantization"] for cell in cells if cell["fault"] == "none"}
    for cell in cells:
        cell["label"] = label_of(cell, healthy[cell["format"]])
    write_json(output / f"seed-{seed}" / "cells.json", cells)


class Measure:
    """What the rule looks at, for the models of one study."""

    def __init__(self, folder: StudyFolder, recipe: Recipe) -> None:
        self.folder, self.arm = folder, recipe.arm_by_name[recipe.arm_names[0]]
        self.tokenizer = load_tokenizer(self.arm.model)
        text = open_probe(self.arm.data, self.tokenizer, 64)
        assert text is not None
        self.text = text
        self.asked = self._questions()
        self.bf16 = cache(self._bf16)

    def _bf16(self, name: str | None) -> tuple[float, float]:
        """(nats a token of text of the pretraining kind, nats an answer) of an arm's plain weights; None: the start."""
        path = self.arm.model.path if name is None else str(self.folder.arm(name).path)
        model = load_model(ModelConfig(path=path), torch.bfloat16)
        return mean_nll(model, self.text, batch_size=16), self._an_answer(model)

    def quantized(self, name: str) -> float:
        """Nats an answer of an arm as it is deployed."""
        return self._an_answer(artifact.load(self.folder.arm(name).quantized)[0])

    def _an_answer(self, model: Any) -> float:
        questions, labels = self.asked
        nats = mean_nll(model, questions, batch_size=64, labels=labels)
        return nats * int((labels[:, 1:] != IGNORE_INDEX).sum()) / len(questions)

    def _questions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """([num_items, longest] token ids, labels of the right answers); what is padded lies after them."""
        rows = []
        for task in demo.TASKS:
            for item in Random(task).sample(demo.items(task)[SCORED:], ASKED):
                question = self.tokenizer(item["query"])["input_ids"]
                whole = self.tokenizer(f"{item['query']} {item['choices'][item['answer']]}")["input_ids"]
                assert whole[: len(question)] == question
                rows.append(
                    (torch.tensor(whole), torch.tensor([IGNORE_INDEX] * len(question) + whole[len(question) :]))
                )
        ids, labels = ([row[i] for row in rows] for i in (0, 1))
        return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)


def cell_of(folder: StudyFolder, arm: Arm, found: ArmDiagnosis, measure: Measure, seed: int) -> dict[str, Any]:
    """One cell: what was planted, what training and quantization cost, what was found."""
    format, _, fault = arm.name.partition("-")
    start, twin = measure.bf16(None), measure.bf16(str(arm.twin))
    text = math.log(found.perplexity["on"] / found.perplexity["twin"])
    forgetting = twin[0] - start[0], twin[1] - start[1]
    quantization = text, measure.quantized(arm.name) - twin[1]
    return {
        "seed": seed,
        "format": format,
        "fault": fault,
        "harm": {"forgetting": forgetting, "quantization": quantization},
        "findings": found.findings,
        "alarms": first_alarms(folder.arm(arm.name)),
        "effects": {effect.name: effect.to_dict() for effect in found.effects},
        "sentence": found.sentence,
    }


def label_of(cell: Mapping[str, Any], healthy: Sequence[float]) -> list[str]:
    """The planted causes that did harm by the rule; `healthy` is what quantization costs the format without a fault."""
    quantization = [cost - usual for cost, usual in zip(cell["harm"]["quantization"], healthy, strict=True)]
    of_cause = {"forgetting": cell["harm"]["forgetting"], "saturation": quantization, "resolution": quantization}

    def harmful(cause: str) -> bool:
        return any(harm >= limit for harm, limit in zip(of_cause[cause], HARM[cause], strict=True))

    return [cause for cause in PLANTED[cell["fault"]] if harmful(cause)]


def run_healthy(num_seeds: int, output: Path) -> None:
    """Train the demo as it is, seed by seed, and print every alarm."""
    console, raised = Console(), 0
    with TerminalDisplay(console) as display:
        for seed in range(num_seeds):
            settings = [f"output_dir={output}", f"name=healthy-{seed}", f"train.seed={seed}"]
            checked = preflight(load_recipe("demo", settings))
            folder = StudyFolder(output / f"healthy-{seed}")
            for segments in plan_segments(checked.arms, checked.plans, folder.path):
                if segments.own.arm.name == "hif8" and segments.trunk is not None:
                    train_segment(segments.trunk, display)
                    train_segment(segments.own, display)
            alarms = read_alarms(folder.arm("hif8").alarms)
            raised += bool(alarms)
            console.print(f"seed {seed}: {len(alarms)} alarms", *(row["text"] for row in alarms), sep="\n  ")
    console.print(f"{raised} of {num_seeds} healthy runs raised an alarm")


def confusion(cells: Sequence[Mapping[str, Any]], title: str) -> Table:
    """What the rule says of the cells, down, by what was found, across."""
    counts = Counter(
        (", ".join(cell["label"]) or "nothing", ", ".join(cell["findings"]) or "nothing") for cell in cells
    )
    names = [", ".join(c) or "nothing" for c in ((), ("forgetting",), ("saturation",), ("forgetting", "saturation"))]
    names += sorted({name for pair in counts for name in pair} - set(names))
    matrix = Table("harmful by the rule \\ found", *names, title=f"{counts.total()} {title}")
    for label in names:
        matrix.add_row(label, *(str(counts[label, found]) for found in names))
    return matrix


def summarize(output: Path, console: Console) -> None:
    """Print the confusion matrix and a line for each cell; write faults.csv."""
    files = sorted(output.glob("seed-*/cells.json"))
    cells = [cell for file in files for cell in read_json(file, list[dict[str, Any]])]
    for title, mild in (("cells", False), ("mild cells", True)):
        console.print(confusion([cell for cell in cells if (cell["fault"] in MILD) == mild], title))
    columns = ["seed", "format", "fault", "forgetting_nats_token", "forgetting_nats_answer"]
    columns += ["quantization_nats_token", "quantization_nats_answer", "label", "found", "alarms"]
    rows = [
        [
            *(str(cell[key]) for key in ("seed", "format", "fault")),
            *(f"{value:.4f}" for kind in ("forgetting", "quantization") for value in cell["harm"][kind]),
            *(" ".join(cell[key]) for key in ("label", "findings")),
            " ".join(f"{kind}@{step}" for kind, step in cell["alarms"].items()),
        ]
        for cell in cells
    ]
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    with (output / "faults.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--summary", action="store_true", help="only print what is there")
    parser.add_argument("--healthy", type=int, metavar="SEEDS", help="only train the healthy demo over so many seeds")
    options = parser.parse_args()
    if options.healthy:
        run_healthy(options.healthy, options.output)
        return
    if not options.summary:
        run_seed(options.seed, options.output)
    summarize(options.output, Console())


if __name__ == "__main__":
    main()
