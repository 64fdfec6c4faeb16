"""Statistics of every quantized tensor at every step, on disk as Parquet.

    tensors/step-000500.parquet     the steps after the previous part, up to this one
    tensors/unfinished.parquet      the steps since then, of a run that was stopped between two parts

A part is written with each checkpoint that is due, whole or not at all, and parts later than the checkpoint that a run
goes on from are dropped. What a run that is stopped has seen since its last part is in its checkpoint, too; so a resumed
run writes the same parts as one that was never stopped. A row is a step and a tensor and takes a few bytes: 10,000 steps
of 182 linears come to well under 1 GB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from qatrun.files import reading, whole_file
from qatrun.layout import TENSORS, TENSORS_ENDING, UNFINISHED_TENSORS, by_step, step_name
from qatrun.quant import STATISTICS
from qatrun.ranks import world

Table = npt.NDArray[np.float32]

SCHEMA = pa.schema(
    [("step", pa.int32()), ("tensor", pa.dictionary(pa.int32(), pa.string()))]
    + [(name, pa.float32()) for name in STATISTICS]
)


class TensorFile:
    """Collects the rows of a segment and writes them a part at a time; of several processes, which collect the same, the
    first writes."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """
        Args:
            folder: of the segment.
            names: of the quantized tensors, in the order of the tables.
        """
        self._folder, self._names = folder / TENSORS, list(names)
        self._rows: list[tuple[int, Table]] = []
        self._leads = world().leads

    def begin(self, from_step: int) -> None:
        """Go on after so many steps: parts that say something of later ones are dropped."""
        for last_step, part in by_step(self._folder, TENSORS_ENDING).items():
            if last_step > from_step and self._leads:
                part.unlink()

    def add(self, step: int, table: Table) -> None:
        """Keep one step's statistics, [num_tensors, len(STATISTICS)] float32, NaN where nothing was measured."""
        self._rows.append((step, table))

    def state_dict(self) -> dict[str, Tensor]:
        """What no part holds yet, if anything: steps [num] and their tables [num, num_tensors, len(STATISTICS)]."""
        if not self._rows:
            return {}
        steps, tables = zip(*self._rows, strict=True)
        return {"steps": torch.tensor(steps), "tables": torch.from_numpy(np.stack(tables))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "steps" in state:
            self._rows = list(zip(state["steps"].tolist(), state["tables"].numpy(), strict=True))

    def write(self, step: int) -> None:
        """Write what was added since the last part, up to this step, as a part."""
        if self._rows:
            self._write(self._folder / step_name(step, TENSORS_ENDING))
            self._rows.clear()
        if self._leads:
            (self._folder / UNFINISHED_TENSORS).unlink(missing_ok=True)

    def show(self) -> None:
        """Write what was added since the last part for readers of a run that is stopped here."""
        if self._rows:
            self._write(self._folder / UNFINISHED_TENSORS)

    def _write(self, file: Path) -> None:
        if not self._leads:
            return
        steps = np.repeat(np.array([step for step, _ in self._rows], dtype=np.int32), len(self._names))
        indices = np.tile(np.arange(len(self._names), dtype=np.int32), len(self._rows))
        values = np.concatenate([table for _, table in self._rows])
        columns = [pa.array(column, from_pandas=True) for column in values.T]  # from_pandas: NaN becomes null
        tensors = pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(self._names))
        with whole_file(file) as partial:
            pq.write_table(pa.table([pa.array(steps), tensors, *columns], schema=SCHEMA), partial, compression="zstd")


def read_tensor_stats(folder: Path) -> pa.Table:
    """All rows of a segment's folder, in order; none where nothing was recorded.

    Raises:
        DamagedFileError: a part is torn or something else.
    """
    parts = by_step(folder / TENSORS, TENSORS_ENDING)
    tables = [_read(part) for part in parts.values()]
    unfinished = folder / TENSORS / UNFINISHED_TENSORS
    if unfinished.is_file():
        table = _read(unfinished)
        tables.append(table.filter(pc.greater(table["step"], max(parts, default=0))))  # a part may have come since
    return pa.concat_tables(tables).unify_dictionaries() if tables else SCHEMA.empty_table()


def _read(part: Path) -> pa.Table:
    with reading(part):
        return pq.read_table(part, schema=SCHEMA)
