"""The page of a study with several seeds: the summary, and links to the page of each seed."""

from __future__ import annotations

from qatrun.records.seeds import ArmOfSeeds, Seeds
from qatrun.report.page import seeds
from qatrun.report.page.content import SeedsContent
from qatrun.report.page.document import VERDICT_CHIPS, Chip, Document, Point, Section, Verdict
from qatrun.report.page.over_ptq import over_ptq_section
from qatrun.report.page.study_page import environment_section, figures_section, page_meta, recipe_section
from qatrun.report.page.table import printable, sentence_case


def seeds_document(content: SeedsContent) -> Document:
    """Everything on the page of a study with seeds."""
    found = content.seeds
    arms, numbers = found.arms, found.seeds
    figures = [seeds.drop_figure(arms, numbers), seeds.accuracy_figure(arms, numbers)]
    contrast, damage = seeds.contrasts_figure(found), seeds.damage_figure(arms, numbers)
    sections = (
        *over_ptq_section(found.over_ptq),
        figures_section("contrasts", "Contrasts", [contrast], "The study names no contrasts between arms."),
        Section(
            "arms",
            "Arms",
            figures=tuple(figure for figure in figures if figure),
            tables=(seeds.arms_table(arms, numbers),),
            notes=() if figures[0] else ("No arm has a BF16 twin, so there is no drop to show.",),
        ),
        figures_section("damage", "Loss and damage", [damage], "No arm has both a loss error and a drop."),
        Section(
            "seeds",
            "Seeds",
            links={f"seed {seed}": page for seed, page in content.pages.items()},
            notes=("Every seed is a whole study with a page of its own: curves, tensors, diagnosis, alarms.",)
            if content.pages
            else ("No page of a single seed was written.",),
        ),
        recipe_section(content.recipe),
        environment_section(content.environment),
    )
    meta = (seeds.count_seeds(numbers), *page_meta(content.environment, content.model))
    indices = {name: index for index, name in enumerate(arms)}
    return Document(content.name, "study over seeds", meta, _verdict(found), sections, indices)


def _verdict(found: Seeds) -> Verdict:
    arms, num_seeds, counted = found.arms, len(found.seeds), seeds.count_seeds(found.seeds)
    broken = {name: _finding_chips(arm, num_seeds) for name, arm in arms.items() if any(arm.findings or ())}
    diagnosed = any(arm.findings for arm in arms.values())
    if broken:
        sentence = f"{len(broken)} of {len(arms)} arms broke in at least one of {counted}."
        chips = (Chip(f"{len(broken)} of {len(arms)} arms broke", "bad"),)
    elif diagnosed:
        sentence, chips = f"Nothing broke: {len(arms)} arms, {counted}.", (Chip("Nothing broke", "good"),)
    else:
        sentence, chips = f"{len(arms)} arms, {counted}, not diagnosed.", (Chip("Not diagnosed", "none"),)
    answers = tuple(Point(sentence_case(each.answer)) for each in found.contrasts)
    overall = (VERDICT_CHIPS[found.verdict],) if "verdict" in found.model_fields_set else ()
    return Verdict(overall + chips, sentence, answers + tuple(Point("", name, words) for name, words in broken.items()))


def _finding_chips(arm: ArmOfSeeds, num_seeds: int) -> tuple[Chip, ...]:
    counts = seeds.finding_counts(arm).items()
    return tuple(Chip(printable(f"{name} {count} of {num_seeds}").capitalize(), "bad") for name, count in counts)
