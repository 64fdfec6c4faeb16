"""A tiny study, trained in a second: trunk, arms, and what is left of them to compare."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from builders import VOCAB_SIZE, tiny_llama, token_ids, word_tokenizer
from studies import CLOCK_FIELDS
from transformers import GPT2Config, GPT2LMHeadModel

from qatrun.data import open_data
from qatrun.files import sha256
from qatrun.quant import make_plan
from qatrun.recipe import parse_recipe
from qatrun.records.training import Outcome
from qatrun.study.segments import ArmSegments, plan_segments
from qatrun.train.checkpoint import latest_checkpoint
from qatrun.train.loop import train
from qatrun.train.metrics import read_alarms, read_metrics
from qatrun.train.segment import Segment, Watched
from qatrun.train.tensors import read_tensor_stats


def gpt2_with_dropout() -> GPT2LMHeadModel:
    """A GPT-2 of 2 blocks, whose training draws random numbers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def write_texts(file: Path, count: int, *, seed: int = 0) -> Path:
    """A .jsonl of `count` documents of 3 to 20 words, each beginning with words that name it."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        words = [f"w{i // 10 + 1}", f"w{i % 10 + 1}"] + [f"w{rng.randrange(11, 60)}" for _ in range(rng.randint(1, 18))]
        rows.append(json.dumps({"text": " ".join(words)}) + "\n")
    file.write_text("".join(rows), encoding="utf-8")
    return file


class Recorder:
    """A listener that keeps what it is told, and can do something after a step."""

    def __init__(self, after: Mapping[int, Callable[[], None]] | None = None) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.warnings: list[str] = []
        self.alarms: list[str] = []
        self.after = after or {}

    def on_step(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        self.after.get(row["step"], lambda: None)()

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)

    def on_alarm(self, text: str) -> None:
        self.alarms.append(text)


def ctrl_c() -> None:
    """What a user's Ctrl-C does to this process."""
    os.kill(os.getpid(), signal.SIGINT)


class TinyStudy:
    """A trunk of 3 steps and arms up to step 7, on 4 sequences of 16 tokens a step in 2 micro-batches.

    Args:
        folder: where checkpoints go; the text lies beside it, so that studies beside each other read the same.
        make_model: gives the start model, the same at each call.
        sections: deep overrides of the recipe, by section: train={"steps": 9}.
    """

    def __init__(
        self,
        folder: Path,
        make_model: Callable[[], Any] = tiny_llama,
        *,
        tokenizer: Any = None,
        arms: Mapping[str, Any] | None = None,
        **sections: Mapping[str, Any],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.make_model, self.tokenizer = make_model, tokenizer or word_tokenizer()
        texts = folder.parent / "texts.jsonl"
        if not texts.is_file():
            write_texts(texts, 60)
        defaults: dict[str, Any] = {
            "model": {"path": "made-in-the-test", "compute_dtype": "float32"},
            "data": {"train": {"path": str(texts)}, "seq_len": 16, "valid_sequences": 2},
            "train": {
                "steps": 7,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 1e-2,
                "lr_warmup_steps": 2,
                "save_every": 2,
            },
            "warmup": {"steps": 3},
            "qat": {"format": "hif8", "scaling": {"window": 3}},
            "monitor": {
                "sqnr_every": 2,
                "probe": {"every": 2, "sequences": 2, "top_k": 8},
                "alarms": {"sqnr_db": 40.0, "forgetting_nats": 1e-6},  # raised, so that a resume has some to keep
            },
        }
        for name, section in sections.items():
            defaults[name] = defaults[name] | dict(section)
        chosen = dict(arms or {"bf16": {"qat": None}, "hif8": {}})
        resolved = parse_recipe({"name": "tiny", "eval": {"tasks": {"none": 0}}, "arms": chosen} | defaults).arm_by_name
        model = make_model()
        plans = {name: make_plan(model, arm.qat) if arm.qat else None for name, arm in resolved.items()}
        planned = plan_segments(resolved, plans, folder)
        self.arms: dict[str, ArmSegments] = {segments.own.arm.name: segments for segments in planned}

    def train(self, segment: Segment, listener: Any = None, trackers: Sequence[str] = ()) -> tuple[Any, Outcome]:
        """One stretch from its newest checkpoint to its end; (model, outcome)."""
        model = self.make_model().to(getattr(torch, segment.arm.model.param_dtype))
        arm = segment.arm
        stream = open_data(arm.data, self.tokenizer, arm.train.seed).train
        # Of no pattern, so that the loss on it rises while the model learns one.
        text = token_ids(arm.monitor.probe.sequences) if arm.monitor.probe else None
        watched, teacher = Watched(text), self.teacher_of(segment)
        return model, train(segment, model, stream, listener or Recorder(), trackers, watched, teacher)

    def teacher_of(self, segment: Segment) -> Any:
        """The start model, in the compute dtype, where the segment's training wants one."""
        compute = getattr(torch, segment.arm.model.compute_dtype)
        return None if segment.arm.teacher is None else self.make_model().to(compute)

    def train_arm(self, name: str = "hif8", make_listener: Callable[[], Any] = Recorder) -> Any:
        """Trunk and arm to their end; the model."""
        segments = self.arms[name]
        if segments.trunk is not None:
            self.train(segments.trunk, make_listener())
        return self.train(segments.own, make_listener())[0]


def final_state(segment: Segment) -> dict[str, Any]:
    """All that two equal runs agree on: every tensor of the last checkpoint, its plain data and the metrics."""
    checkpoint, warnings = latest_checkpoint(segment.folder / "checkpoints")
    assert checkpoint is not None
    assert not warnings
    parts = {name: state for name, state in checkpoint.parts.items() if name != "clock"}
    values = {f"{part}/{name}": value for part, state in parts.items() for name, value in state.items()}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return {
        "tensors": tensors,
        "plain": {name: value for name, value in values.items() if name not in tensors},
        "run": (checkpoint.step, checkpoint.identity),
        "metrics": [
            {key: value for key, value in row.items() if key not in CLOCK_FIELDS}
            for row in read_metrics(segment.folder / "metrics.jsonl")
        ],
        "statistics": read_tensor_stats(segment.folder),
        "parts": {file.name: sha256(file) for file in (segment.folder / "tensors").glob("*")},
        "checkpoints": sorted(folder.name for folder in (segment.folder / "checkpoints").iterdir()),
        "alarms": read_alarms(segment.folder / "alarms.jsonl"),
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two final states do not agree on, bit for bit; empty where they are equal."""
    names = one["tensors"].keys() | other["tensors"].keys()
    found = [
        name
        for name in sorted(names)
        if name not in one["tensors"]
        or name not in other["tensors"]
        or not torch.equal(one["tensors"][name], other["tensors"][name])
    ]
    parts = ("run", "plain", "metrics", "statistics", "parts", "checkpoints", "alarms")
    return found + [part for part in parts if one[part] != other[part]]
