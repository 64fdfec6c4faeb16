"""A study in a notebook: one line that changes while it runs, and its result as a small table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from markupsafe import Markup

from qatrun.report.stages import Pace, Stage, clock_time
from qatrun.report.total import COLUMNS, Total, ranked_rows, tiles

COLORS = {"good": "#14713f", "warn": "#8a5a00", "bad": "#b3261e"}
EVERY_STEPS = 5


class NotebookDisplay:
    """Shows training and scoring in one line of a notebook, and warnings and alarms below it; a context manager.

    Args:
        show: takes the HTML of what there is to be seen, each time in place of what it took before.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._pace = Pace()
        self._what, self._detail = "", ""
        self._first = 0
        self._twin: Mapping[int, float] = {}
        self._said: list[Markup] = []

    def __enter__(self) -> NotebookDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._what, self._detail = "" if error is None else "stopped; resume=True goes on", ""
        self._draw()

    def begin_study(self, stages: Sequence[Stage]) -> None:
        self._pace = Pace(stages)

    def begin_training(
        self, segment: str, first_step: int, last_step: int, twin_losses: Mapping[int, float] | None = None
    ) -> None:
        self._first, self._last, self._twin = first_step, last_step, twin_losses or {}
        self._pace.begin("training", segment)
        self._begin(f"training {segment}")

    def on_step(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        self._pace.advance(step - self._first)
        if step % EVERY_STEPS == 0 or step == self._last:
            twin = f" (twin {self._twin[step]:.4f})" if step in self._twin else ""
            self._detail = f"step {step} of {self._last}, loss {row['loss']:.4f}{twin}"
            self._draw()

    def begin_reading(self, what: str) -> None:
        self._pace.begin("reading", what)
        self._begin(f"reading {what}")

    def begin_scoring(self, what: str) -> None:
        self._pace.begin("scoring", what)
        self._begin(f"scoring {what}")

    def on_scored(self, task: str, done: int, total: int) -> None:
        if done == total:
            self._detail = f"{task} {done:,} of {total:,}"
            self._draw()

    def on_warning(self, text: str) -> None:
        self._say("warning", text)

    def on_alarm(self, text: str) -> None:
        self._say("alarm", text)

    def note(self, text: str) -> None:
        self._detail = text
        self._draw()

    def _begin(self, what: str) -> None:
        self._what, self._detail = f"{self._pace.place}: {what}" if self._pace.place else what, "loading"
        self._draw()

    def _say(self, kind: str, text: str) -> None:
        color = COLORS["bad" if kind == "alarm" else "warn"]
        self._said.append(Markup('<div><b style="color:{}">{}</b>: {}</div>').format(color, kind, text))
        self._draw()

    def _draw(self) -> None:
        left = self._pace.seconds_left if self._what else None
        more = f" · {clock_time(left)} left" if left is not None else ""
        line = Markup("<div><b>{}</b> {}{}</div>").format(self._what, self._detail, more)
        self._show(line + Markup("").join(self._said))


def in_a_cell() -> NotebookDisplay:
    """A display below the cell that runs."""
    import transformers
    from IPython.display import HTML, display

    transformers.utils.logging.disable_progress_bar()  # one for each model that is loaded, in red
    shown = display(HTML(""), display_id=True)
    return NotebookDisplay(lambda html: shown.update(HTML(html)))


def result_html(ranked: Sequence[Total], sentence: str, page: Path | None) -> str:
    """A finished study: what it came to, every arm, and where its page lies."""
    parts = []
    if ranked:
        best = ranked[0]
        pill = Markup('<b style="color:{}">{}</b>').format(COLORS[best.state], best.answer)
        shown = [tile for tile in tiles(best) if tile[0] != "budget"]
        parts.append(Markup("<div>{}: {}</div>").format(best.pair.arm, pill))
        parts += [Markup("<div>{}: <b>{}</b> {}</div>").format(what, value, more) for what, value, more in shown]
        head = Markup("").join(Markup("<th>{}</th>").format(name) for name in COLUMNS)
        rows = [
            Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row))
            for row in ranked_rows(ranked)
        ]
        parts.append(Markup("<table><tr>{}</tr>{}</table>").format(head, Markup("").join(rows)))
    if sentence:
        parts.append(Markup("<div>{}</div>").format(sentence))
    if page is not None:
        parts.append(Markup('<div><a href="{}">{}</a></div>').format(page.as_posix(), page.as_posix()))
    return str(Markup("").join(parts))
