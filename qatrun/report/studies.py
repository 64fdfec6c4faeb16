"""The studies of a folder on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import RenderableType
from rich.text import Text

from qatrun.report.grid import Grid
from qatrun.report.tables import VERDICT_STYLES
from qatrun.text import readable_size


class Study(Protocol):
    """What is shown of one; see `study.housekeeping.StudySummary`."""

    @property
    def name(self) -> str: ...
    @property
    def date(self) -> str: ...
    @property
    def arms(self) -> tuple[str, ...]: ...
    @property
    def state(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def freed_bytes(self) -> int: ...


def studies_table(studies: Sequence[Study]) -> RenderableType:
    """A row a study."""
    grid = Grid("", "study", "begun", "verdict", "size", "clean frees", "arms")
    for study in studies:
        state = Text(study.state, style=dict(VERDICT_STYLES).get(study.state, "dim"))
        freed = readable_size(study.freed_bytes) if study.freed_bytes else "-"
        grid.add_row(study.name, study.date, state, readable_size(study.num_bytes), freed, ", ".join(study.arms))
    return grid
