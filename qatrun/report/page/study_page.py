"""The page of a study with one seed: what each section holds, and what is said where something is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qatrun.records.environment import Environment
from qatrun.records.training import distinct
from qatrun.report.exported import contents, holds, proofs
from qatrun.report.page import causes, scores
from qatrun.report.page.content import ArmContent, StudyContent
from qatrun.report.page.coverage import coverage_section
from qatrun.report.page.curves import forgetting_figure, loss_figure, teacher_figure
from qatrun.report.page.document import Chip, Document, Point, Section
from qatrun.report.page.figure import Figure
from qatrun.report.page.heatmap import heatmap_figure
from qatrun.report.page.histograms import histogram_figure
from qatrun.report.page.over_ptq import over_ptq_section
from qatrun.report.page.scales import scale_figure
from qatrun.report.page.seeds import contrasts_figure
from qatrun.report.page.table import difference, printable, sentence_case, table
from qatrun.report.page.tensors import TensorStats
from qatrun.report.page.total import ranked, ranking_table, total_tiles, waterfall_figure
from qatrun.report.page.verdict import study_verdict
from qatrun.text import flat

Measured = Sequence[tuple[ArmContent, TensorStats]]

MAX_ALARMS = 50
CLIPS = 0.001  # the share of a tensor's values from which it counts as clipping
MAX_TENSORS = 18  # drawn one by one, over all arms


def study_document(content: StudyContent) -> Document:
    """Everything on the page of a study."""
    recorded = [(arm, TensorStats.from_table(arm.tensors)) for arm in content.arms if arm.tensors is not None]
    measured = [(arm, stats) for arm, stats in recorded if len(stats)]
    sections = (
        *_total_section(content),
        _diagnosis_section(content),
        _scores_section(content),
        *over_ptq_section(content.comparison.over_ptq if content.comparison else ()),
        *_contrasts_section(content),
        figures_section(
            "loss",
            "Loss and its error",
            [loss_figure(content.arms), teacher_figure(content.arms)],
            "No training record (metrics.jsonl).",
        ),
        _saturation_section(content, measured),
        _scale_section(content, measured),
        figures_section(
            "forgetting",
            "Forgetting",
            [forgetting_figure(content.arms, content.forgetting_limit)],
            "No step was probed in this study, so there is no forgetting curve.",
        ),
        _histogram_section(content),
        coverage_section(content.arms),
        *_exports_section(content.arms),
        alarms_section(content.arms),
        *_flips_section(content),
        *_differences_section(content),
        recipe_section(content.recipe),
        environment_section(content.environment),
    )
    indices = {arm.name: arm.index for arm in content.arms}
    return Document(
        content.name, "study", page_meta(content.environment, content.model), study_verdict(content), sections, indices
    )


def _total_section(content: StudyContent) -> Iterator[Section]:
    """Nothing where nothing was compared."""
    found = ranked(content)
    if not found:
        return
    figure = waterfall_figure(content, found)
    several = f"The best of {len(found)} arms, {printable(found[0].pair.arm)}; all of them below."
    yield Section(
        "total",
        "From start to what ships",
        figures=() if figure is None else (figure,),
        tables=(ranking_table(found),),
        notes=(several,) if len(found) > 1 else (),
        tiles=total_tiles(found[0]),
    )


def _differences_section(content: StudyContent) -> Iterator[Section]:
    """What tells the arms apart; nothing where that is only one, or the recipe cannot be read."""
    if content.differences:
        names = tuple(next(iter(content.differences.values())))
        rows = [(key, *(values[name] for name in names)) for key, values in content.differences.items()]
        yield Section("differences", "What differs between arms", tables=(table(("key", *names), rows),))


def _flips_section(content: StudyContent) -> Iterator[Section]:
    """Items that quantization turned; nothing where none did, or their answers are not there."""
    if content.flips:
        columns = ("arm", "task", "flip", "item", "right answer", "shift, nats")
        rows = [
            (f.arm, f.task, "↓" if f.to_wrong else "↑", f.item, f.answer, difference(f.shift)) for f in content.flips
        ]
        note = (
            "Items that the twin answers right and the arm wrong (↓) or the other way round (↑), those first whose right "
            "answer lost or gained most. Their texts are shown where they are the demo's own; else the item is named."
        )
        yield Section("flips", "Items that flipped", notes=(note,), tables=(table(columns, rows, key="flips"),))


def page_meta(environment: Environment, model: str) -> tuple[str, ...]:
    """Date, model and version, as far as they are known."""
    version = environment.packages.get("qatrun")
    facts = (environment.date[:10], model, f"qatrun {version}" if version else "")
    return tuple(printable(fact) for fact in facts if fact)


def figure_key(kind: str, arm: ArmContent, arms: Iterable[ArmContent]) -> str:
    """`kind-arm`, safe as a file name and in an address; numbered where two arms' names would fall together."""
    safe = {each.name: re.sub(r"[^A-Za-z0-9._-]", "_", each.name) for each in arms}
    again = sum(name == safe[arm.name] for name in safe.values()) > 1
    return f"{kind}-{safe[arm.name]}" + (f"-{arm.index}" if again else "")


def tensors_each(num_arms: int) -> int:
    """How many tensors of each arm are drawn one by one."""
    return max(2, min(6, MAX_TENSORS // num_arms if num_arms else 6))


def figures_section(key: str, title: str, figures: Iterable[Figure | None], missing: str) -> Section:
    """A section of the figures that could be drawn, or the line that says why there are none."""
    drawn = tuple(figure for figure in figures if figure is not None)
    return Section(key, title, figures=drawn, notes=() if drawn else (missing,))


def _exports_section(arms: Iterable[ArmContent]) -> Iterator[Section]:
    """What was proven of the folders that arms were exported as; nothing where none was."""
    points = [
        Point(printable(sentence_case(line)), arm.name, (Chip(record.format, "good" if holds(record) else "bad"),))
        for arm in arms
        for record in arm.exports
        for line in (contents(record), *proofs(record), *record.notes)
    ]
    if points:
        yield Section("exports", "Exported folders", points=tuple(points))


def recipe_section(recipe: str) -> Section:
    """The recipe as it ran."""
    return Section(
        "recipe", "Recipe", text=recipe, folded=True, notes=() if recipe else ("The recipe is missing (recipe.yaml).",)
    )


def environment_section(environment: Environment) -> Section:
    """What it ran on."""
    facts = tuple((name, _fact(value)) for name, value in flat(environment.to_dict()).items())
    missing = () if facts else ("What it ran on was not recorded (environment.json).",)
    return Section("environment", "Environment", facts=facts, notes=missing)


def alarms_section(arms: Iterable[ArmContent]) -> Section:
    """Every alarm, the first MAX_ALARMS on the page and all in the CSV file."""
    raised = sorted(((alarm["step"], arm.name, alarm) for arm in arms for alarm in arm.alarms), key=lambda row: row[0])
    if not raised:
        return Section("alarms", "Alarms", notes=("No alarm was raised.",))
    columns = ("step", "arm", "kind", "alarm", "tensor")
    rows = [(step, arm, alarm["kind"], alarm["text"], alarm.get("tensor")) for step, arm, alarm in raised]
    once = distinct(alarm for _, _, alarm in raised)
    points = [
        Point(
            printable(alarm["text"]),
            next(arm for _, arm, each in raised if each == alarm),
            (Chip(printable(alarm["kind"]).capitalize(), "alarm"),),
        )
        for alarm in once[:MAX_ALARMS]
    ]
    shown = f", the first {MAX_ALARMS} of them here" if len(once) > MAX_ALARMS else ""
    count = f"{len(once):,} alarm{'s were' if len(once) > 1 else ' was'} raised{shown}."
    return Section(
        "alarms", "Alarms", notes=(count,), points=tuple(points), files=(table(columns, rows, key="alarms"),)
    )


def _diagnosis_section(content: StudyContent) -> Section:
    if content.diagnosis is None:
        return Section("diagnosis", "Diagnosis", notes=("The study was not diagnosed: `qatrun diagnose` does it.",))
    figure = causes.text_figure(content)
    drawn = () if figure is None else (figure,)
    worst = [
        (name, row.tensor, row.clip_fraction, row.overshoot, row.sqnr_db, row.since_step)
        for name, arm in content.diagnosed.items()
        for row in arm.worst_tensors
        if row.clip_fraction > CLIPS
    ]
    columns = ("arm", "worst tensor", "clip fraction", "overshoot", "SQNR dB", "since step")
    tables = (
        causes.causes_table(content.diagnosed),
        scores.effects_table(content),
        scores.variants_table(content.diagnosed),
        table(columns, worst, "Worst tensors", "worst-tensors"),
    )
    return Section(
        "diagnosis",
        "Diagnosis",
        figures=drawn,
        tables=tuple(part for part in tables if part.rows),
        notes=() if drawn or any(part.rows for part in tables) else ("The diagnosis holds no effects.",),
    )


def _scores_section(content: StudyContent) -> Section:
    figure = scores.scores_figure(content)
    if figure is None:
        return Section(
            "scores", "Scores", notes=("No arm was compared with a BF16 twin, so there is no drop to show.",)
        )
    tables = (scores.score_table(content), scores.evidence_table(content), scores.cost_table(content))
    notes = tuple(
        f"{printable(pair.arm)} was compared anyway, although: {printable(text)}"
        for pair in content.pairs
        for text in pair.mismatches
    )
    changed = tuple(printable(f"{text}: these scores are of other weights.") for text in content.changed)
    return Section("scores", "Scores", (figure,), tables, (*changed, *notes))


def _contrasts_section(content: StudyContent) -> tuple[Section, ...]:
    """Nothing at all where the recipe asks for no contrasts."""
    figure = contrasts_figure(content.summary) if content.summary else None
    if content.summary is None or figure is None:
        return ()
    answers = tuple(Point(sentence_case(each.answer)) for each in content.summary.contrasts)
    return (Section("contrasts", "Contrasts", figures=(figure,), points=answers),)


def _saturation_section(content: StudyContent, measured: Measured) -> Section:
    figures = [
        heatmap_figure(arm, stats, figure_key("saturation", arm, content.arms), len(measured))
        for arm, stats in measured
    ]
    return figures_section("saturation", "Saturation", figures, _NO_STATISTICS)


def _scale_section(content: StudyContent, measured: Measured) -> Section:
    arms, num_tensors = content.arms, tensors_each(len(measured))
    figures = [
        scale_figure(arm, stats, content.diagnosed.get(arm.name), figure_key("scale", arm, arms), num_tensors)
        for arm, stats in measured
    ]
    return figures_section("scale", "Scale against amax", figures, _NO_STATISTICS)


def _histogram_section(content: StudyContent) -> Section:
    shown = [arm for arm in content.arms if arm.histograms]
    figures = [
        histogram_figure(arm, figure_key("histograms", arm, content.arms), tensors_each(len(shown))) for arm in shown
    ]
    return figures_section(
        "histograms", "Values on the grid", figures, "No histograms of values were recorded in this study."
    )


_NO_STATISTICS = "No statistics of quantized tensors were recorded in this study."


def _fact(value: Any) -> str:
    text = " ".join(map(str, value)) or "none" if isinstance(value, list) else value
    return printable("none" if text is None else text)
