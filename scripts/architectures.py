"""Every causal architecture of the installed transformers, tiny and with random weights, through the whole of qatrun.

python scripts/architectures.py                         # all: the table in scripts/bench_results/architectures.md
python scripts/architectures.py --only llama mamba      # some: printed

For each: a folder with the model, what `qatrun check` says, a trunk and an arm of a few QAT steps with quantized output
gradients, both exports, and the quantized one read back. It is *supported* if the logits read back equal those that were
written bit for bit, and *refused* if check says why not. Anything else is a fault: it failed late.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from qatrun import demo
from qatrun.data import open_data
from qatrun.evaluate.text import mean_nll
from qatrun.export import artifact
from qatrun.model import DTYPES, load_model, save_model
from qatrun.quant import freeze
from qatrun.recipe import Recipe, parse_recipe
from qatrun.study import dry_run_of, preflight
from qatrun.study.segments import plan_segments
from qatrun.train.loop import train
from qatrun.train.segment import Watched
from tiny_configs import ARCHITECTURES, tiny_config

SUPPORTED, REFUSED, NOT_BUILT, FAILED = "supported", "refused at check", "not built", "failed late"
SECONDS_EACH = 120


@dataclass(frozen=True)
class Result:
    """What became of one architecture: an outcome, and the sentence or the coverage that goes with it."""

    architecture: str
    outcome: str
    detail: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types; default: all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "bench_results" / "architectures.md")
    arguments = parser.parse_args()
    quiet()
    start, results = time.perf_counter(), list[Result]()
    for architecture in arguments.only or ARCHITECTURES:
        results.append(in_own_process(architecture))
        print(f"{architecture}: {results[-1].outcome} -- {results[-1].detail}", flush=True)
    if not arguments.only:
        arguments.output.write_text(table(results, time.perf_counter() - start), encoding="utf-8")
    return 1 if any(result.outcome == FAILED for result in results) else 0


def in_own_process(architecture: str) -> Result:
    """Try one in a fork of this process, so that neither a crash nor a hang of one costs the others."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(architecture, sender))
    process.start()
    sender.close()
    result = Result(architecture, FAILED, f"no answer in {SECONDS_EACH} s")
    try:
        if receiver.poll(SECONDS_EACH):
            result = receiver.recv()
    except EOFError:
        result = Result(architecture, FAILED, "the process died")
    process.kill()
    process.join()
    return result


def _report(architecture: str, sender: Connection) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = attempt(architecture, Path(folder))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            result = Result(architecture, FAILED, f"{said} ({Path(where.filename).name}:{where.lineno})")
    sender.send(result)


def attempt(architecture: str, folder: Path) -> Result:
    """Take one architecture from its config to logits read back."""
    try:
        write_model(architecture, folder / "model")
    except Exception as error:  # its own code, with a config that may be too small for it
        return Result(architecture, NOT_BUILT, _one_line(error))
    recipe = make_recipe(folder, "sdpa")
    checked = preflight(recipe)
    if any(problem.key.endswith("attn_implementation") for problem in checked.problems):
        recipe = make_recipe(folder, "eager")
        checked = preflight(recipe)
    if checked.problems:
        return Result(architecture, REFUSED, checked.problems[0].message.removeprefix(f"{folder / 'model'}: "))
    dry_run_of(checked)
    equal = run(recipe, checked, folder)
    if not equal:
        return Result(architecture, FAILED, "the logits read back differ from those written")
    return Result(architecture, SUPPORTED, str(checked.coverages["fp8"]))


def write_model(architecture: str, folder: Path) -> None:
    """A model folder with random weights and the demo's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture))
    with torch.no_grad():  # some matrices begin as zeros, which would leave all behind them unused
        for parameter in model.parameters():
            if parameter.dim() >= 2 and not parameter.any():
                parameter.normal_(0, 0.02)
    model.eval()(input_ids=torch.arange(32).view(1, -1), use_cache=False)
    if model.can_generate():
        model.generation_config.do_sample = True  # defaults of some set a temperature
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder)


def make_recipe(folder: Path, attention: str) -> Recipe:
    return parse_recipe(
        {
            "name": "sweep",
            "model": {
                "path": str(folder / "model"),
                "compute_dtype": "float32",
                "attn_implementation": attention,
            },
            "data": {"train": {"path": demo.BUILTIN, "split": "finetune"}, "seq_len": 32, "valid_sequences": 2},
            "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "lr_warmup_steps": 0},
            "warmup": {"steps": 1},
            "monitor": {"sqnr_every": 2, "probe": {"every": 2, "sequences": 1}},
            "qat": {"format": "fp8_e4m3", "grad_output": {}, "scaling": {"window": 2}},
            "arms": {"fp8": {}},
            "eval": {"tasks": {"demo_facts": 0}, "limit": 1},
            "output_dir": str(folder / "runs"),
        }
    )


class _Silent:
    """A listener of training that keeps nothing."""

    def on_step(self, row: Mapping[str, Any]) -> None: ...
    def on_warning(self, text: str) -> None: ...
    def on_alarm(self, text: str) -> None: ...


def run(recipe: Recipe, checked: Any, folder: Path) -> bool:
    """Trunk, arm and both exports as a study makes them; whether the quantized model read back is the one written."""
    (arm,) = checked.arms.values()
    tokenizer = AutoTokenizer.from_pretrained(arm.model.path)
    (segments,) = plan_segments(checked.arms, checked.plans, folder / "runs")
    assert segments.trunk is not None
    assert segments.own.plan is not None
    for segment in (segments.trunk, segments.own):
        model = load_model(arm.model, DTYPES[arm.model.param_dtype])
        data = open_data(arm.data, tokenizer, arm.train.seed)
        train(segment, model, data.train, _Silent(), (), Watched(data.valid.input_ids[:1]))
    dtype, plain = DTYPES[arm.model.compute_dtype], folder / "plain"
    save_model(model, tokenizer, plain, dtype)
    freeze(model, dtype)
    artifact.save(model, tokenizer, segments.own.plan, plain / artifact.FOLDER)
    loaded, _ = artifact.load(plain)
    off = load_model(arm.model.model_copy(update={"path": str(plain)}), dtype)
    mean_nll(off, data.valid.input_ids, batch_size=2, labels=data.valid.labels)
    return torch.equal(logits(loaded, data.valid.input_ids), logits(model, data.valid.input_ids))


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # for those that hash at random
    result: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return result


def table(results: Sequence[Result], seconds: float) -> str:
    """Markdown: how many of each outcome, on what, and a row for each architecture."""
    counts = Counter(result.outcome for result in results)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("qatrun", "torch", "transformers"))
    summary = "; ".join(f"{counts[outcome]} {outcome}" for outcome in (SUPPORTED, REFUSED, NOT_BUILT, FAILED))
    lines = [
        "# Architectures",
        "",
        "Every causal architecture of transformers with two layers and random weights: check, three QAT steps with E4M3",
        "weights, inputs and output gradients, export, read back, equal logits (`python scripts/architectures.py`).",
        "",
        f"{len(results)} tried: {summary}.",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}; Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, "
        f"{seconds / 60:.0f} minutes.",
        "",
        "| architecture | outcome | |",
        "|---|---|---|",
    ]
    order = [FAILED, SUPPORTED, REFUSED, NOT_BUILT]
    for result in sorted(results, key=lambda result: (order.index(result.outcome), result.architecture)):
        lines.append(f"| {result.architecture} | {result.outcome} | {result.detail.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def quiet() -> None:
    """Configs are made on purpose to be unlike those that libraries expect."""
    warnings.filterwarnings("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # threads do not survive a fork


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 200 else f"{text[:200]} ..."


if __name__ == "__main__":
    sys.exit(main())
