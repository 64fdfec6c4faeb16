"""How long a recipe's training would take here: steps of the same shapes, timed on weights that are made up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from qatrun.layout import StudyFolder
from qatrun.model import DTYPES, on_device, without_values
from qatrun.quant import Mode, QuantPlan, attach
from qatrun.recipe import Arm
from qatrun.study.checking import Preflight
from qatrun.study.segments import plan_segments

TIMED = 2  # forwards and backwards, after one that warms up


def training_seconds(checked: Preflight) -> float:
    """Of all arms, their trunks included; nothing of what is scored. Optimizer steps are not timed."""
    folder = StudyFolder(Path(checked.recipe.output_dir) / checked.recipe.name).path
    arms: Mapping[str, Arm] = checked.arms
    paces = {name: _seconds_a_step(arm, checked.plans[name]) for name, arm in arms.items()}
    plain = min(paces.values())
    total, trunks = 0.0, set()
    for each in plan_segments(arms, checked.plans, folder):
        first = 0 if each.trunk is None else each.trunk.last_step
        if each.trunk is not None and each.trunk.folder not in trunks:
            trunks.add(each.trunk.folder)
            total += first * plain
        total += (each.own.last_step - first) * paces[each.own.name]
    return total


def _seconds_a_step(arm: Arm, plan: QuantPlan | None) -> float:
    model = on_device(without_values(arm.model)).train()
    if plan is not None:
        attach(model, plan).enter(Mode.QUANTIZE)
    device = next(model.parameters()).device
    ids = torch.zeros(arm.train.micro_batch_size, arm.data.seq_len, dtype=torch.long, device=device)
    dtype = DTYPES[arm.model.compute_dtype]
    for number in range(1 + TIMED):
        if number == 1:
            begun = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return (time.perf_counter() - begun) / TIMED * (arm.train.global_batch_size / arm.train.micro_batch_size)
