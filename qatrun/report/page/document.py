"""The parts of a page, from top to bottom, as the template takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from qatrun.report.page.figure import Figure
from qatrun.report.page.table import Table, csv_text
from qatrun.report.page.total import Tile


@dataclass(frozen=True)
class Chip:
    """A word and the state that colours it: good, warn, bad, alarm or none."""

    word: str
    state: str


@dataclass(frozen=True)
class Point:
    """A sentence about an arm, or about the study where `arm` is empty."""

    text: str
    arm: str = ""
    chips: tuple[Chip, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The top of the page: words, one sentence, and a sentence for each arm."""

    chips: tuple[Chip, ...]
    sentence: str
    points: tuple[Point, ...] = ()
    condition: str = ""


@dataclass(frozen=True)
class Section:
    """Attributes:
    notes: honest lines, such as why a figure is missing.
    facts: names and values.
    text: preformatted.
    links: label -> address.
    files: tables that are there as CSV files alone.
    tiles: numbers that matter, above all else.
    folded: whether `text` is shown only when asked for.
    """

    key: str
    title: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    points: tuple[Point, ...] = ()
    text: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Table, ...] = ()
    tiles: tuple[Tile, ...] = ()
    folded: bool = False

    @property
    def has_content(self) -> bool:
        """Whether there is more than a line on what is missing."""
        return bool(self.figures or self.tables or self.facts or self.points or self.text or self.links or self.tiles)


@dataclass(frozen=True)
class Document:
    """A whole page.

    Attributes:
        meta: short facts under the name.
        arms: arm -> its index.
    """

    name: str
    kind: str
    meta: tuple[str, ...]
    verdict: Verdict
    sections: tuple[Section, ...]
    arms: Mapping[str, int]

    @cached_property
    def csv(self) -> dict[str, str]:
        """CSV file name -> text, of every figure and every table with a name."""
        figures = {figure.key: figure.csv for section in self.sections for figure in section.figures}
        named = [part for section in self.sections for part in (*section.tables, *section.files) if part.key]
        return {f"{key}.csv": text for key, text in (figures | {part.key: csv_text([part]) for part in named}).items()}


VERDICT_CHIPS: Mapping[str | None, Chip] = {
    "within": Chip("Within budget", "good"),
    "inconclusive": Chip("Inconclusive", "warn"),
    "exceeds": Chip("Exceeds its budget", "bad"),
    None: Chip("No verdict", "none"),
}
