"""What training recorded about an arm, for a diagnosis: which tensors were worst, and since when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from qatrun.layout import ArmFolder
from qatrun.recipe import AlarmConfig
from qatrun.records.diagnosis import TensorRecord
from qatrun.records.training import MetricsRow
from qatrun.train.metrics import read_alarms, read_metrics
from qatrun.train.tensors import read_tensor_stats

SHOWN = 5
TOO_SMALL = 1.5  # amax over what the scale stands for; less is the noise of a batch
CLIPS = 0.001  # the share of a tensor's values that counts as clipping where no alarm has a threshold


def clipping_limit(alarms: AlarmConfig) -> float:
    """The mean share of clipped values from which a tensor counts as clipping."""
    return alarms.clip_fraction or CLIPS


def tensor_records(folder: Path, alarms: AlarmConfig) -> list[TensorRecord]:
    """Every quantized tensor of an arm's folder, those that clip most first, then those with least SQNR."""
    table = read_tensor_stats(folder)
    table = table.filter(pc.is_valid(table["clip_fraction"]))
    if not table.num_rows:
        return []
    limit = clipping_limit(alarms)
    codes = table["tensor"].combine_chunks()
    names = codes.dictionary.to_pylist()
    index = codes.indices.to_numpy()
    columns = {
        name: table[name].to_numpy()
        for name in ("step", "clip_fraction", "overshoot", "sqnr_db", "scale")  # null becomes NaN
    }
    records = []
    for number, name in enumerate(names):
        rows = {key: column[index == number] for key, column in columns.items()}
        if not len(rows["step"]):
            continue
        measured = rows["sqnr_db"][np.isfinite(rows["sqnr_db"])]  # Inf: nothing was lost
        overshoots = rows["overshoot"][~np.isnan(rows["overshoot"])]
        clips = rows["step"][rows["clip_fraction"] > limit]
        records.append(
            TensorRecord(
                tensor=name,
                clip_fraction=float(rows["clip_fraction"].mean()),
                overshoot=float(overshoots.max()) if len(overshoots) else 0.0,
                typical_overshoot=float(np.median(overshoots)) if len(overshoots) else None,
                sqnr_db=float(measured[-1]) if len(measured) else None,
                since_step=int(clips[0]) or None if len(clips) else None,  # 0: nothing was trained
                scale=float(rows["scale"][-1]) if not np.isnan(rows["scale"][-1]) else None,
            )
        )
    return sorted(records, key=lambda r: (-r.clip_fraction, np.inf if r.sqnr_db is None else r.sqnr_db))


def never_too_small(records: Sequence[TensorRecord]) -> bool:
    """Whether no scale of these tensors ever was."""
    return bool(records) and max(record.overshoot for record in records) < TOO_SMALL


def first_alarms(folder: ArmFolder) -> dict[str, int]:
    """Kind of alarm -> step of its first, of those that were raised, in that order."""
    first: dict[str, int] = {}
    for row in read_alarms(folder.alarms):
        first.setdefault(row["kind"], row["step"])
    return first


def last_probe(folder: ArmFolder) -> MetricsRow | None:
    """The last row of metrics with a forgetting probe, or None."""
    rows = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    return next((row for row in reversed(rows) if "kl_off" in row), None)


def read_losses(folder: ArmFolder) -> dict[int, float]:
    """Step -> training loss, as far as it was trained."""
    return {row["step"]: row["loss"] for row in (read_metrics(folder.metrics) if folder.metrics.is_file() else ())}


def losses(folder: ArmFolder, num_steps: int) -> dict[int, MetricsRow]:
    """Step -> its row of metrics, of a run of so many steps; empty unless all of them are there: a mean over what is left
    of a record would be another number."""
    rows = {row["step"]: row for row in (read_metrics(folder.metrics) if folder.metrics.is_file() else ())}
    return rows if rows.keys() == set(range(1, num_steps + 1)) else {}
