"""Plant faults in runs of the demo, and see whether alarms and diagnosis find them, and nothing else.

    python scripts/fault_bench.py --seed 0 --output /tmp/faults       one seed: 19 cells, about 12 minutes on one core
    python scripts/fault_bench.py --summary --output /tmp/faults      the confusion matrix over the seeds there; faults.csv
    python scripts/fault_bench.py --healthy 10 --output /tmp/faults   alarms of the demo's HiF8 arm over 10 seeds, unscored

Planted, each in hif8, fp8_e4m3 and int8:

    none      nothing
    lr        a learning rate of 3e-3, which forgets
    scale     every scale estimate 8 times too small, values clipped at the target
    lag       the same, but HiF8's own range as the edge (in hif8 only: elsewhere that is the target)
    both      lr and scale
    burst     the latest amax, renewed every 10 steps, on data whose every tenth batch is of another kind, clipped
              at the target
    outlier   one channel in eight before each attention and MLP block 64 times as large, undone in the weights that read
              it: the same function

A fault that does no harm is no fault. The rule that labels a cell was written before any cell was run, and uses neither the
benchmark items' accuracy nor their answers' log-probability, which the diagnosis looks at. Fault and measure:

    lr, both         forgetting, if training without quantizers (the twin) raises the log-perplexity of held-out text of the
                     pretraining kind by 0.05 nats or more over the start model's
    scale, lag,      saturation, if the arm's log-perplexity of held-out text, quantizers on, is 0.02 nats or more above
    both, burst      its twin's
    outlier          resolution, by the same measure
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from qatrun import demo
from qatrun.data import open_probe
from qatrun.evaluate.perplexity import perplexity
from qatrun.model import load_model, load_tokenizer, save_model
from qatrun.quant import ScaleState
from qatrun.recipe import Arm, ModelConfig, Recipe, load_recipe, parse_recipe
from qatrun.recipe.merge import deep_merge
from qatrun.report import TerminalDisplay
from qatrun.study import preflight, run_study, single
from qatrun.study.diagnose import diagnose
from qatrun.study.layout import StudyFolder, read_json, write_json
from qatrun.study.records import first_alarm
from qatrun.study.segments import plan_segments
from qatrun.train import read_metrics

FORMATS = ("hif8", "fp8_e4m3", "int8")
PLANTED = {
    "none": (),
    "lr": ("forgetting",),
    "scale": ("saturation",),
    "lag": ("saturation",),
    "both": ("forgetting", "saturation"),
    "burst": ("saturation",),
    "outlier": ("resolution",),
}
HARM = {"forgetting": 0.05, "saturation": 0.02, "resolution": 0.02}
UNDERESTIMATE, OUTLIER, EVERY_CHANNEL, BURST_EVERY = 8.0, 64.0, 8, 10
STEPS, WARMUP = 80, 20
HOT = {"learning_rate": 3e-3}
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
        "eval": {"limit": 150},
    }
    shared = load_recipe("demo").model_dump(mode="json", exclude={"arms"})
    return parse_recipe(deep_merge(deep_merge(shared, shortened), sections) | {"arms": dict(arms)})


def main_recipe(seed: int, output: Path) -> Recipe:
    """Every fault that needs neither another model nor other data; the trunks are shared."""
    arms: dict[str, Any] = {"bf16": {"qat": None}, "bf16-lr": {"qat": None, "train": HOT}}
    for format in FORMATS:
        arms[f"{format}-none"] = {"twin": "bf16", "qat": {"format": format}}
        arms[f"{format}-lr"] = {"twin": "bf16-lr", "qat": {"format": format}, "train": HOT}
        arms[f"{format}-scale"] = {"twin": "bf16", "qat": {"format": format, **AT_TARGET}}
        arms[f"{format}-both"] = {"twin": "bf16-lr", "qat": {"format": format, **AT_TARGET}, "train": HOT}
    arms["hif8-lag"] = {"twin": "bf16", "qat": {"format": "hif8", "clip": "format"}}
    return recipe_of("main", seed, output, arms)


def burst_recipe(seed: int, output: Path) -> Recipe:
    """The latest amax, ten steps old, on bursty data."""
    scaling = {"algorithm": "most_recent", "window": 1, "update_interval": BURST_EVERY}
    arms: dict[str, Any] = {"bf16": {"qat": None}}
    arms |= {f"{format}-burst": {"qat": {"format": format, "scaling": scaling, **AT_TARGET}} for format in FORMATS}
    text = write_bursty_text(output / f"bursty-{seed}.jsonl", seed)
    return recipe_of(
        "burst", seed, output, arms, data={"train": {"path": str(text), "split": "train", "shuffle": False}}
    )


def outlier_recipe(seed: int, output: Path) -> Recipe:
    """The start model with planted outlier channels."""
    arms: dict[str, Any] = {"bf16": {"qat": None}}
    arms |= {f"{format}-outlier": {"qat": {"format": format}} for format in FORMATS}
    return recipe_of("outlier", seed, output, arms, model={"path": str(write_outlier_model(output / "outlier-model"))})


def write_bursty_text(file: Path, seed: int) -> Path:
    """Nine batches of stories, then one that says few words over and over, again and again. The seed chooses the stories:
    nothing else of this text depends on it, since it is read in order."""
    if file.is_file():
        return file
    stories = islice(demo.documents("finetune"), 8_000 * (seed % 4), None)
    rows: list[str] = []
    for burst in range(12):
        rows += [next(stories) for _ in range(550)]
        words = next(stories).split()[: 2 + burst % 3]
        rows += [" ".join(words * 60)] * 16
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


@contextmanager
def planted() -> Iterator[None]:
    """Under-estimate the scales of arms whose name says so, while they train."""
    train, estimate = single.train, ScaleState._estimate

    def too_small(state: ScaleState) -> torch.Tensor:
        return estimate(state) / UNDERESTIMATE

    def train_planted(segment: Any, *arguments: Any) -> Any:
        wrong = segment.arm.name.endswith(("-scale", "-lag", "-both")) and segment.quantizes
        with mock.patch.object(ScaleState, "_estimate", too_small if wrong else estimate):
            return train(segment, *arguments)

    with mock.patch.object(single, "train", train_planted):
        yield


def run_seed(seed: int, output: Path) -> None:
    """Train, score, label and diagnose every cell of a seed; writes cells.json."""
    cells: list[dict[str, Any]] = []
    with TerminalDisplay(Console()) as display:
        for recipe in (main_recipe(seed, output), burst_recipe(seed, output), outlier_recipe(seed, output)):
            with planted():
                folder = StudyFolder(run_study(recipe, display, resume=True).folder)
            found = diagnose(folder, display)["arms"]
            forgetting = probe_losses(folder, recipe)
            cells += [
                cell_of(folder, recipe.resolve_arm(name), result, forgetting, seed) for name, result in found.items()
            ]
    write_json(output / f"seed-{seed}" / "cells.json", cells)


def probe_losses(folder: StudyFolder, recipe: Recipe) -> dict[str, float]:
    """BF16 arm -> rise of the log-perplexity of held-out text of the pretraining kind over the start model's."""
    arms = [recipe.resolve_arm(name) for name in recipe.arm_names]
    text = open_probe(arms[0].data, load_tokenizer(arms[0].model), 64)

    def loss(path: str) -> float:
        return perplexity(load_model(ModelConfig(path=path), torch.bfloat16), text, batch_size=16).nll_mean

    start = loss(arms[0].model.path)
    return {arm.name: loss(str(folder.arm(arm.name).path)) - start for arm in arms if arm.qat is None}


def cell_of(
    folder: StudyFolder, arm: Arm, found: Mapping[str, Any], forgetting: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """One cell: what was planted, what harm it did by the rule, what was found."""
    format, _, fault = arm.name.rpartition("-")
    values = found["perplexity"]
    quantization = math.log(values["on"] / values["twin"])
    harm = {"forgetting": forgetting[str(arm.twin)], "saturation": quantization, "resolution": quantization}
    return {
        "seed": seed,
        "format": format,
        "fault": fault,
        "harm_nats": {"forgetting": harm["forgetting"], "quantization": quantization},
        "label": [cause for cause in PLANTED[fault] if harm[cause] >= HARM[cause]],
        "findings": found["findings"],
        "alarms": {
            kind: step
            for kind in ("saturation", "resolution", "forgetting", "quantization")
            if (step := first_alarm(folder.arm(arm.name).path, kind)) is not None
        },
        "effects": {effect["name"]: effect for effect in found["effects"]},
        "sentence": found["sentence"],
    }


def run_healthy(num_seeds: int, output: Path) -> None:
    """Train the demo as it is, seed by seed, and print every alarm."""
    console, raised = Console(), 0
    with TerminalDisplay(console) as display:
        for seed in range(num_seeds):
            settings = [f"output_dir={output}", f"name=healthy-{seed}", f"train.seed={seed}"]
            recipe = load_recipe("demo", settings)
            checked, folder = preflight(recipe), StudyFolder(output / f"healthy-{seed}")
            study = single._Study(recipe, checked, folder, display, ())
            for segments in plan_segments(checked.arms, checked.plans, folder.path):
                if segments.own.arm.name == "hif8" and segments.trunk is not None:
                    study._train(segments.trunk)
                    study._train(segments.own)
            alarms = read_metrics(folder.arm("hif8").path / "alarms.jsonl")
            raised += bool(alarms)
            console.print(f"seed {seed}: {len(alarms)} alarms", *(row["text"] for row in alarms), sep="\n  ")
    console.print(f"{raised} of {num_seeds} healthy runs raised an alarm")


def summarize(output: Path, console: Console) -> None:
    """Print the confusion matrix and a line for each cell."""
    cells = [cell for file in sorted(output.glob("seed-*/cells.json")) for cell in read_json(file)]
    names = [", ".join(c) or "nothing" for c in ((), ("forgetting",), ("saturation",), ("forgetting", "saturation"))]
    counts = Counter(
        (", ".join(cell["label"]) or "nothing", ", ".join(cell["findings"]) or "nothing") for cell in cells
    )
    names += sorted({name for pair in counts for name in pair} - set(names))
    matrix = Table("harmful by the rule \\ found", *names, title=f"{len(cells)} cells")
    for label in names:
        matrix.add_row(label, *(str(counts[label, found]) for found in names))
    console.print(matrix)
    table = Table("seed", "format", "fault", "forgetting", "quantization", "label", "found", "alarms")
    for cell in cells:
        harm = cell["harm_nats"]
        table.add_row(
            *(str(cell[key]) for key in ("seed", "format", "fault")),
            f"{harm['forgetting']:+.3f}",
            f"{harm['quantization']:+.3f}",
            ", ".join(cell["label"]),
            ", ".join(cell["findings"]),
            ", ".join(f"{kind} {step}" for kind, step in cell["alarms"].items()),
        )
    console.print(table)
    with (output / "faults.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["seed", "format", "fault", "harm_forgetting_nats", "harm_quantization_nats", "label", "found", "alarms"]
        )
        for cell in cells:
            harm = cell["harm_nats"]
            alarms = " ".join(f"{kind}@{step}" for kind, step in cell["alarms"].items())
            numbers = [f"{harm[kind]:.4f}" for kind in ("forgetting", "quantization")]
            causes = [" ".join(cell[key]) for key in ("label", "findings")]
            rows.writerow([cell["seed"], cell["format"], cell["fault"], *numbers, *causes, alarms])


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
