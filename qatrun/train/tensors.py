"""Statistics of every quantized tensor at every step, on disk as Parquet.

    tensors/step-000500.parquet     the steps after the previous checkpoint, up to this one

A part is written with each checkpoint, whole or not at all, and parts later than the checkpoint that a run goes on from
are dropped; so a resumed run has the same parts as one that was never stopped. A row is a step and a tensor and takes a
few bytes: 10,000 steps of 182 linears come to well under 1 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from qatrun.quant import STATISTICS

FOLDER = "tensors"
Table = npt.NDArray[np.float32]

SCHEMA = pa.schema(
    [("step", pa.int32()), ("tensor", pa.dictionary(pa.int32(), pa.string()))]
    + [(name, pa.float32()) for name in STATISTICS]
)


class TensorFile:
    """Collects the rows of a segment and writes them a part at a time."""

    def __init__(self, folder: Path, names: Sequence[str], *, from_step: int) -> None:
        """Go on after `from_step` steps: parts that say something of later ones are dropped.

        Args:
            folder: of the segment.
            names: of the quantized tensors, in the order of the tables.
        """
        self._folder, self._names = folder / FOLDER, list(names)
        self._rows: list[tuple[int, Table]] = []
        for part in _parts(self._folder):
            if _last_step(part) > from_step:
                part.unlink()

    def add(self, step: int, table: Table) -> None:
        """Keep one step's statistics, [num_tensors, len(STATISTICS)] float32, NaN where nothing was measured."""
        self._rows.append((step, table))

    def write(self, step: int) -> None:
        """Write what was added since the last part, up to this step."""
        if not self._rows:
            return
        steps = np.repeat(np.array([step for step, _ in self._rows], dtype=np.int32), len(self._names))
        indices = np.tile(np.arange(len(self._names), dtype=np.int32), len(self._rows))
        values = np.concatenate([table for _, table in self._rows])
        columns = [pa.array(column, from_pandas=True) for column in values.T]  # from_pandas: NaN becomes null
        tensors = pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(self._names))
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / ".partial"
        pq.write_table(pa.table([pa.array(steps), tensors, *columns], schema=SCHEMA), partial, compression="zstd")
        partial.replace(self._folder / f"step-{step:06d}.parquet")
        self._rows.clear()


def read_tensor_stats(folder: Path) -> pa.Table:
    """All rows of a segment's folder, in order; none where nothing was recorded."""
    parts = [pq.read_table(part, schema=SCHEMA) for part in _parts(folder / FOLDER)]
    return pa.concat_tables(parts).unify_dictionaries() if parts else SCHEMA.empty_table()


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.parquet"), key=_last_step)


def _last_step(part: Path) -> int:
    return int(part.stem.removeprefix("step-"))
