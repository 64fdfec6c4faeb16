"""A study's folder as a finished run leaves it, made up from a formula: for tests of what is drawn from it.

Three arms: `bf16`, its twin `hif8`, which is healthy, and `int8`, of which one tensor's scale lags from a step on where
`broken` is set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from qatrun.evaluate.causes import CAUSES
from qatrun.export import artifact
from qatrun.formats import ROLES
from qatrun.quant import QuantPlan
from qatrun.records.scores import STRATA
from qatrun.scheme import Scaling, Scheme

NUM_ITEMS = (2000, 2016, 2000)
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
VERDICTS = ("within", "inconclusive", "exceeds")
PARTS = 5  # parquet files of an arm's statistics


@dataclass(frozen=True)
class Shape:
    """How large the study is, and what breaks in it.

    Attributes:
        prefix: of every linear's name.
        tasks: as names in the comparison and the diagnosis; three.
    """

    steps: int = 300
    warmup: int = 50
    blocks: int = 4
    arms: tuple[str, ...] = ("bf16", "hif8", "int8")
    broken: bool = True
    seed: int = 0
    prefix: str = "model.layers"
    tasks: tuple[str, str, str] = ("demo_facts", "demo_routines", "demo_inference")

    @property
    def linears(self) -> list[str]:
        return [f"{self.prefix}.{block}.{kind}" for block in range(self.blocks) for kind in (*KINDS, *MLP)]

    @property
    def fault_step(self) -> int:
        """From here on the broken arm's scale lags."""
        return self.warmup + (self.steps - self.warmup) * 3 // 5


def write_study(folder: Path, shape: Shape = Shape()) -> Path:
    """A whole study with everything that a page shows."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(shape.seed)
    arms = [{"arm": name, "bad": shape.broken and name == "int8"} for name in shape.arms]
    (folder / "recipe.yaml").write_text(recipe_text(folder.name, shape), encoding="utf-8")
    write_json(folder / "environment.json", environment())
    write_json(folder / "start" / "result.json", {"arm": "start", "perplexity": {"on": 4.81}})
    twin_loss = 1.2 + 1.1 * np.exp(-np.arange(shape.steps) / (0.22 * shape.steps)) + rng.normal(0, 0.03, shape.steps)
    for arm in arms:
        _write_arm(folder / arm["arm"], arm["arm"], arm["bad"], twin_loss, shape, rng)
    pairs = [_pair(arm["arm"], arm["bad"], shape) for arm in arms if arm["arm"] != "bf16"]
    verdict = max((pair["comparison"]["verdict"] for pair in pairs), key=VERDICTS.index)
    write_json(folder / "comparison.json", {"study": folder.name, "verdict": verdict, "pairs": pairs})
    write_json(folder / "diagnosis.json", _diagnosis([arm for arm in arms if arm["arm"] != "bf16"], shape))
    return folder


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def _jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_arm(folder: Path, name: str, bad: bool, twin_loss: Any, shape: Shape, rng: Any) -> None:
    quantized = name != "bf16"
    folder.mkdir(parents=True, exist_ok=True)
    _jsonl(folder / "metrics.jsonl", _metrics(quantized, bad, twin_loss, shape, rng))
    linears = len(shape.linears)
    record = {"arm": name, "twin": "bf16" if quantized else None, "coverage": None, "perplexity": {"on": 2.28}}
    if quantized:
        record["coverage"] = f"{linears} of {linears + 1} linears, 88% of linear FLOPs"
    write_json(folder / "result.json", record)
    if not quantized:
        return
    _write_tensors(folder / "tensors", bad, shape, rng)
    write_json(folder / "histograms.json", {"tensors": [_histogram(tensor, name) for tensor in _watched(shape)]})
    write_json(folder / "quantized" / "plan.json", _quantized(name, shape))
    _jsonl(folder / "alarms.jsonl", [_alarm(shape)] if bad else [])


def _metrics(quantized: bool, bad: bool, twin_loss: Any, shape: Shape, rng: Any) -> list[dict[str, Any]]:
    error = (0.03 if bad else 0.0007) * np.abs(rng.normal(1, 0.4, shape.steps))
    rows = []
    probe_every = max(1, shape.steps // 30)
    for step in range(1, shape.steps + 1):
        qat = quantized and step > shape.warmup
        loss = float(twin_loss[step - 1] * (1 + error[step - 1] * min(1, (step - shape.warmup) / 40) if qat else 1.0))
        row = {"step": step, "phase": "qat" if qat else "bf16", "loss": loss, "learning_rate": 1e-4, "num_saturated": 0}
        if step % probe_every == 0:
            row["kl_off"] = 0.018 * step / shape.steps * (1.05 if quantized else 1.0)
            if qat:
                row["kl_on"] = row["kl_off"] + (0.011 if bad and step > shape.fault_step else 0.0016)
        rows.append(row)
    return rows


def _write_tensors(folder: Path, bad: bool, shape: Shape, rng: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{linear}:{role}" for linear in shape.linears for role in ("input", "weight", "grad_output")]
    steps = np.arange(shape.warmup + 1, shape.steps + 1)
    for part in np.array_split(steps, PARTS):
        if len(part):
            parquet.write_table(_stats_table(names, part, bad, shape, rng), folder / f"step-{part[-1]:06d}.parquet")


def _stats_table(names: Sequence[str], steps: Any, bad: bool, shape: Shape, rng: Any) -> pa.Table:
    num = len(names) * len(steps)
    tensor = np.tile(np.arange(len(names)), len(steps))
    step = np.repeat(steps, len(names))
    base = np.exp2((np.arange(len(names)) * 7 % 11) / 3.0)[tensor]
    amax = base * (1 + 0.4 * np.sin(step / shape.steps * 9 + tensor)) * np.exp(rng.normal(0, 0.05, num))
    estimate = base * 1.55
    if bad:
        lagging = (tensor % 12 == 0) & (step > shape.fault_step)
        amax = np.where(lagging, amax * (1.5 + 5 * (step - shape.fault_step) / shape.steps), amax)
    overshoot = amax / estimate
    clip = np.where(overshoot > 1, np.minimum(0.3, 2e-5 * overshoot**5), 0.0) if bad else np.zeros(num)
    floats = {
        "amax": amax,
        "scale": estimate / 127,
        "overshoot": overshoot,
        "clip_fraction": clip,
        "underflow_fraction": np.full(num, 0.01),
    }
    columns = {key: pa.array(value.astype(np.float32)) for key, value in floats.items()}
    return pa.table(
        {
            "step": pa.array(step.astype(np.int32)),
            "tensor": pa.DictionaryArray.from_arrays(pa.array(tensor.astype(np.int32)), list(names)),
            **columns,
            "sqnr_db": pa.nulls(num, pa.float32()),
        }
    )


def _watched(shape: Shape) -> list[str]:
    return [f"{linear}:input" for linear in shape.linears[3:7]]


def _histogram(tensor: str, name: str) -> dict[str, Any]:
    edges = np.arange(-24, 16.5, 0.5)
    target = {"int8": 127.0}.get(name, 15.0)
    middle = edges[:-1] + 0.25 - math.log2(target) + 2.1
    density = np.exp2(middle) * np.exp(-np.exp2(2 * middle) / 2)
    counts = (density / density.sum() * 120_000).astype(int)
    known = name if name in ("hif8", "int8") else "hif8"
    return {
        "tensor": tensor,
        "format": known,
        "scale": 0.01,
        "target_amax": target,
        "log2_edges": edges.tolist(),
        "counts": counts.tolist(),
        "num_zero": 300,
        "num_values": int(counts.sum()) + 300,
    }


def _quantized(name: str, shape: Shape) -> dict[str, Any]:
    known = name if name in ("hif8", "int8") else "hif8"
    schemes = dict.fromkeys(ROLES, Scheme(known, "per_tensor", 15.0, Scaling(window=32)))
    plan = QuantPlan(dict.fromkeys(shape.linears, schemes), {linear: linear for linear in shape.linears})
    described = {"compute_dtype": "bfloat16", "attn_implementation": "sdpa", "plan": plan.to_dict()}
    return {"format_version": artifact.FORMAT_VERSION, **described}


def _alarm(shape: Shape) -> dict[str, Any]:
    return {
        "step": shape.fault_step + 20,
        "kind": "saturation",
        "text": f"step {shape.fault_step + 20}: 3 of 28 inputs clip > 0.1 % for 20 steps, worst "
        f"{shape.linears[0]} (overshoot 3.9x): scale estimates lag; widen "
        "qat.scaling.window or use algorithm max",
        "tensor": f"{shape.linears[0]}:input",
    }


def _pair(name: str, bad: bool, shape: Shape) -> dict[str, Any]:
    drops = (0.2, 0.35, -0.35) if not bad else (4.1, 2.6, 1.7)
    tasks = [_task(*each) for each in zip(shape.tasks, drops, NUM_ITEMS, strict=True)]
    verdict = max((task["verdict"] for task in tasks), key=VERDICTS.index)
    return {
        "arm": name,
        "twin": "bf16",
        "comparison": {
            "tasks": tasks,
            "perplexity": _perplexity(bad),
            "training": {
                "num_items": sum(NUM_ITEMS),
                "drop_pp": 0.6,
                "ci95_pp": [0.1, 1.1],
                "budget_pp": 3.0,
                "asked": False,
                "verdict": "within",
            },
            "verdict": verdict,
            "conditional_on": "these checkpoints, one training seed, these items",
        },
        "loss_ape_percent": {"all_steps": 0.062, "after_switch": 2.9 if bad else 0.074},
        "perplexity": {"start": 4.81, "twin": 2.283, "arm": 2.41 if bad else 2.282, "arm_off": 2.283},
        "cost": {
            "twin": {"seconds": 71.2, "peak_memory_bytes": 941 * 2**20},
            "arm": {"seconds": 62.4, "peak_memory_bytes": 978 * 2**20},
        },
        "sizes": {"plain_bytes": 5_347_000, "quantized_bytes": 3_040_000},
        "coverage": "28 of 29 linears, 88% of linear FLOPs",
        "mismatches": [],
    }


def _perplexity(bad: bool) -> dict[str, Any]:
    rise = 5.6 if bad else -0.04
    return {
        "num_sequences": 64,
        "num_tokens": 8128,
        "start": 4.81,
        "twin": 2.283,
        "arm": 2.41 if bad else 2.282,
        "rise_percent": rise,
        "ci95_percent": [rise - 0.3, rise + 0.3],
        "detectable_rise_percent": 0.43,
        "budget_percent": 1.0,
        "verdict": "exceeds" if bad else "within",
        "sequences_to_settle": None,
    }


def _text_effects(bad: bool) -> dict[str, Any]:
    rises = {"training": -0.75, "whole": 0.054 if bad else 0.0, "ptq": 0.002, "beyond ptq": 0.052 if bad else -0.002}
    return {
        name: {
            "held-out": {
                "rise": rise,
                "ci95": [rise - 0.003, rise + 0.003],
                "num_tokens": 8128,
                "strata": {stratum: [rise, rise - 0.006, rise + 0.006] for stratum in STRATA},
            }
        }
        for name, rise in rises.items()
    }


def _causes(bad: bool) -> dict[str, Any]:
    ruled_out = {"answer": "ruled out", "could_hide": None, "unit": "", "looks": [_look("ruled out", 0.0)]}
    found = {"answer": "found", "could_hide": None, "unit": "", "looks": [_look("found", 0.054)]}
    return dict.fromkeys(CAUSES, ruled_out) | ({"saturation": found} if bad else {})


def _look(answer: str, value: float) -> dict[str, Any]:
    return {
        "what": "held-out text",
        "effects": ["whole"],
        "values": [value],
        "intervals": [[value - 0.004, value + 0.004]],
        "threshold": 0.02,
        "unit": "nats a token",
        "decides": True,
        "answer": answer,
    }


def _task(name: str, drop: float, items: int) -> dict[str, Any]:
    low, high = drop - 0.62, drop + 0.61
    verdict = "within" if high < 1.5 else "exceeds" if low > 1.5 else "inconclusive"
    return {
        "task": name,
        "metric": "acc",
        "num_fewshot": 0,
        "num_items": items,
        "start": 0.8455,
        "twin": 0.8425,
        "arm": 0.8425 - drop / 100,
        "arm_off": 0.8435,
        "drop_pp": drop,
        "drop_relative_percent": drop / 0.8425,
        "ci95_pp": [low, high],
        "mcnemar_p": 0.31,
        "flips_to_wrong": 18,
        "flips_to_right": 14,
        "mean_abs_delta_loglikelihood": 0.06,
        "detectable_drop_pp": 0.79,
        "budget_pp": 1.5,
        "verdict": verdict,
        "items_to_settle": 12_000 if verdict == "inconclusive" else None,
    }


def _effect(name: str, start: str, end: str, drop: float, width: float = 0.6) -> dict[str, Any]:
    return {
        "name": name,
        "from": start,
        "to": end,
        "drop_pp": drop,
        "ci95_pp": [drop - width, drop + width],
        "loglikelihood": -drop / 100,
        "ci95_loglikelihood": [-drop / 100 - 0.008, -drop / 100 + 0.008],
        "text_loglikelihood": -drop / 100,
        "ci95_text_loglikelihood": [-drop / 100 - 0.004, -drop / 100 + 0.004],
        "log_perplexity": drop / 120,
    }


def _diagnosis(arms: Sequence[Mapping[str, Any]], shape: Shape) -> dict[str, Any]:
    found = {arm["arm"]: _diagnosed_arm(arm["arm"], arm["bad"], shape) for arm in arms}
    sentences = [arm["sentence"] for arm in found.values() if arm["findings"]]
    return {
        "sentence": sentences[0] if sentences else "hif8: nothing broke: what it lost lies within the noise.",
        "arms": found,
    }


def _diagnosed_arm(name: str, bad: bool, shape: Shape) -> dict[str, Any]:
    effects = [
        _effect("forgetting", "start", "off", 0.4),
        _effect("training", "start", "twin", 0.5),
        _effect("quantization", "off", "on", 2.8 if bad else 0.1),
        _effect("stale scale", "fresh", "on", 2.5 if bad else 0.0),
        _effect("ptq", "twin", "ptq", 0.9),
    ]
    tensor = f"{shape.linears[0]}:input"
    worst = [
        {"tensor": tensor, "clip_fraction": 0.012, "overshoot": 3.9, "sqnr_db": 12.1, "since_step": shape.fault_step}
    ]
    sentence = (
        f"{name}: saturation: {tensor} clips 1.2 % of its values since step {shape.fault_step}; fresh scales bring "
        "back 2.5 of 2.8 pp; widen qat.scaling.window or use algorithm max."
        if bad
        else f"{name}: nothing broke: what it lost lies within the noise."
    )
    scored = {
        "start": 0.8455,
        "twin": 0.8425,
        "ptq": 0.834,
        "off": 0.8435,
        "on": 0.814 if bad else 0.8425,
        "fresh": 0.8421,
    }
    return {
        "sentence": sentence,
        "findings": ["saturation"] if bad else [],
        "causes": _causes(bad),
        "texts": _text_effects(bad),
        "effects": effects,
        "tasks": dict.fromkeys(shape.tasks, effects),
        "accuracy": dict.fromkeys(shape.tasks, scored),
        "perplexity": {
            "start": 4.81,
            "twin": 2.283,
            "ptq": 2.31,
            "off": 2.283,
            "on": 2.41 if bad else 2.282,
            "fresh": 2.29,
        },
        "probe": {"start": 1.41, "twin": 1.43, "ptq": 1.44, "off": 1.43, "on": 1.47, "fresh": 1.43},
        "worst_tensors": worst if bad else [],
        "since_step": shape.fault_step if bad else None,
    }


def environment() -> dict[str, Any]:
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "command": ["qatrun", "train", "demo"],
        "python": "3.11.9",
        "packages": {"qatrun": "0.1.0", "torch": "2.13.0", "transformers": "5.0.0"},
        "cpu": {"model": "A CPU", "threads": 2, "cores": 2},
        "memory_gib": 15.6,
        "gpus": [],
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "arms": {"bf16": {"seed": 0, "data_hash": "f00d"}},
    }


def recipe_text(name: str, shape: Shape) -> str:
    arms = "\n".join(
        f"  {json.dumps(arm)}: {{qat: {'null' if arm == 'bf16' else '{format: hif8}'}}}" for arm in shape.arms
    )
    return (
        f"name: {json.dumps(name)}\nmodel: {{path: builtin:demo}}\n"
        f"train: {{steps: {shape.steps}, learning_rate: 1.0e-4}}\nwarmup: {{steps: {shape.warmup}}}\narms:\n{arms}\n"
    )
