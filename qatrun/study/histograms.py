"""histograms.json of an arm: how the inputs that fared worst are spread over the grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qatrun.files import write_json
from qatrun.layout import ArmFolder
from qatrun.quant import QuantPlan, input_histograms
from qatrun.records.diagnosis import TensorRecord
from qatrun.scheme import Slot
from qatrun.study.records import SHOWN


def write_histograms(
    model: Any, plan: QuantPlan, input_ids: Tensor, folder: ArmFolder, records: Sequence[TensorRecord]
) -> None:
    """Of the first few of these tensors that are inputs with one scale, on this text; nothing where there is none.

    Args:
        model: with quantizers attached.
        input_ids: [num, seq_len].
    """
    slots = [(Slot.parse(record.tensor), record.scale) for record in records]
    scales = {slot.linear: scale for slot, scale in slots if slot.role == "input" and scale is not None}
    if scales:
        tensors = input_histograms(model, input_ids, dict(list(scales.items())[:SHOWN]), plan)
        write_json(folder.histograms, {"tensors": tensors})
