"""An arm that is made by calibration alone, from its twin as it was trained or from the start model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from qatrun.data import open_data
from qatrun.errors import DamagedFileError
from qatrun.files import read_json
from qatrun.layout import START, ArmFolder, StudyFolder
from qatrun.quant import QuantPlan, QuantState
from qatrun.recipe import Arm, CalibrationConfig
from qatrun.records.comparison import Cost
from qatrun.records.training import ArmResult, Match
from qatrun.study.display import Display
from qatrun.study.histograms import write_histograms
from qatrun.study.joint import calibrate_together
from qatrun.study.records import tensor_records
from qatrun.study.variants import calibration_batches
from qatrun.tokenizer import load_tokenizer
from qatrun.train.memory import peak_memory_bytes, reset_peak_memory
from qatrun.train.tensors import TensorFile


@dataclass(frozen=True)
class Source:
    """What an arm is made from, as it lies there now.

    Attributes:
        weights: checksums of a twin's weights; nothing of the start model's, which is watched as the study's input.
        match: of the training of which they are.
    """

    folder: ArmFolder
    weights: dict[str, str]
    match: Match

    @classmethod
    def of(cls, arm: Arm, study: StudyFolder) -> Source:
        """Of an arm whose twin is finished."""
        if arm.twin == START:
            return cls(study.start, {}, {"steps": 0, "seed": arm.train.seed, "data_hash": ""})
        record = read_json(study.arm(str(arm.twin)).result, ArmResult)
        return cls(study.arm(str(arm.twin)), record.weights, record.match)


def calibrate_arm(arm: Arm, source: Source, plan: QuantPlan, folder: ArmFolder, display: Display) -> tuple[Any, Cost]:
    """The model of an arm, quantizers attached, and what it took; statistics and histograms of its tensors on held-out text
    are written beside where it will lie."""
    assert arm.qat is not None
    how = arm.qat.calibrating
    display.note(f"{arm.name}: calibrating {arm.twin} on {how.sequences} sequences of {arm.data.seq_len} tokens")
    reset_peak_memory()
    begun = time.monotonic()
    batches = calibration_batches(arm, how.sequences)
    valid = open_data(arm.data, load_tokenizer(arm.model), arm.train.seed).valid.input_ids
    held_out = valid[: arm.train.micro_batch_size]
    model, statistics = calibrate_together(arm, source.folder, plan, batches, held_out)
    cost = Cost(seconds=time.monotonic() - begun, peak_memory_bytes=peak_memory_bytes())
    state: QuantState = model.quant_state
    stats = TensorFile(folder.path, state.scales.names)
    stats.add(0, statistics.numpy())
    stats.write(0)
    write_histograms(model, plan, held_out, folder, tensor_records(folder.path, arm.monitor.alarms))
    return model, cost


def is_of_other_weights(record: ArmResult, source: Source) -> bool:
    """Whether what an arm was made from has been made again, otherwise, since."""
    return record.made_from != source.weights


def calibrated_alike(study: StudyFolder, arm: Arm, twin: ArmFolder, sequences: int) -> bool:
    """Whether a finished arm was made from this twin, as it is now, by the largest values in so many sequences alone."""
    if arm.trains or arm.qat is None or arm.qat.calibrating != CalibrationConfig(sequences=sequences):
        return False
    try:
        record = read_json(study.arm(arm.name).result, ArmResult)
        return study.arm(str(arm.twin)).path == twin.path and not is_of_other_weights(record, Source.of(arm, study))
    except DamagedFileError:
        return False
