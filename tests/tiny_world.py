"""A study as its user has it: a folder with a model, a text, a task and a recipe; and `qatrun` run in it."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from builders import tiny_llama, word_tokenizer

from qatrun import cli

NUM_SUBJECTS = 20
COLOURS = ("w91", "w92", "w93", "w94")

RECIPE = """\
name: tiny
model:
  path: model
  compute_dtype: float32
data:
  train:
    path: text.jsonl
    text_column: text
  seq_len: 16
  valid_sequences: 4
train:
  steps: 40
  global_batch_size: 8
  micro_batch_size: 4
  learning_rate: 5.0e-2
  lr_warmup_steps: 2
  save_every: 4
warmup:
  steps: 10
qat:
  scaling: {window: 4}
arms:
  bf16: {qat: null}
  hif8: {}
eval:
  tasks:
    likes.yaml: 0
    demo_facts: 0
  limit: 60
  batch_size: 40
"""

TASK = """\
task: likes
dataset_path: json
dataset_kwargs: {data_files: {test: ITEMS}}
output_type: multiple_choice
test_split: test
doc_to_text: query
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""


# An arm that quantization ruins: at its last step weights below 0.5 / 0.4 of their amax turn to zero.
RUINED_ARM = "arms={bf16: {qat: null}, ruined: {qat: {format: int8, start_step: 39, weight: {target_amax: 0.4}}}}"


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def run_qatrun(*arguments: str, cwd: Path) -> Ran:
    """`qatrun ARGUMENTS` in a folder, without the seconds of a new process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        one_thread(),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["qatrun", *arguments]),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tensors as small as these are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_world(folder: Path) -> None:
    """A world of 20 subjects that like a colour each: `model/`, `text.jsonl`, the task `likes.yaml`, `tiny.yaml`."""
    tiny_llama(eos_token_id=0, bos_token_id=None).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)
    colour_of = [rng.randrange(len(COLOURS)) for _ in range(NUM_SUBJECTS)]
    sentences = [f"w{subject} {COLOURS[colour]}" for subject, colour in enumerate(colour_of, start=1)]
    documents = [{"text": " ".join(rng.sample(sentences, 3))} for _ in range(300)]
    items = [
        {"query": f"{before} w{subject}", "choices": COLOURS, "answer": colour_of[subject - 1]}
        for before in sentences[:3]
        for subject in range(1, NUM_SUBJECTS + 1)
    ]
    for name, rows in (("text.jsonl", documents), ("items.jsonl", items)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "likes.yaml").write_text(TASK.replace("ITEMS", "items.jsonl"), encoding="utf-8")
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")


def begun(log: str) -> list[str]:
    """The segments that a log says were begun, in order: `training trunk`, without the time and which stage it is."""
    return re.findall(r"^\d\d:\d\d:\d\d (?:\d+ of \d+: )?(training \S+)(?: \(about .*\))?$", log, re.MULTILINE)
