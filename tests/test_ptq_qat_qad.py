"""PTQ beside QAT beside QAD: the recipes, what is said of finished studies, and that the note shows what was said."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from faults.models import Subject  # noqa: E402
from faults.studies import FORMATS  # noqa: E402
from ptq_qat_qad import FILE, QUESTIONS, Cell, cells_of, keep, read_cells, recipe_of, tables  # noqa: E402
from qatrun.evaluate.scores import ItemScores, Scores, TaskScore  # noqa: E402
from qatrun.files import write_json  # noqa: E402
from qatrun.layout import START, TEXT_FILE, StudyFolder  # noqa: E402
from qatrun.recipe import Recipe, parse_recipe  # noqa: E402
from qatrun.records.scores import TextScore, TextScores  # noqa: E402
from qatrun.report.over_ptq import over_ptq_lines  # noqa: E402
from qatrun.study.over_ptq import over_ptq  # noqa: E402

NUM_ITEMS, NUM_SEQUENCES, LENGTH = 400, 16, 100


def recipe(question: str, folder: Path, seeds: int = 2) -> Recipe:
    subject = Subject("demo", "builtin:demo", folder, {"demo_facts": 0}, None, (), {"sane": 1e-4})
    return recipe_of(question, subject, folder / "demo", seeds, 60)


@pytest.mark.parametrize("question", QUESTIONS)
def test_arms_of_a_question_differ_in_what_it_asks(question: str, tmp_path: Path) -> None:
    arms = recipe(question, tmp_path).arm_by_name
    asked = QUESTIONS[question]
    assert len(arms) == 2 + 5 * len(FORMATS)
    for name, arm in arms.items():
        assert arm.data.train.path == str(tmp_path / f"{asked.text}-train.jsonl")
        weight = None if arm.train.distill is None else arm.train.distill.weight
        assert (weight == asked.weight) == name.endswith(asked.distilled)
        if not arm.trains:
            assert arm.twin == asked.reference
        elif arm.twin is not None:  # the same training, but for the quantizers
            assert (arm.train, arm.warmup, arm.data) == (
                (twin := arms[arm.twin]).train,
                twin.warmup,
                twin.data,
            )


def write_scored(folder: Path, wrong: int, nats: float, noise: np.random.Generator) -> None:
    """A model that has so many items wrong, the first ones, and reads with about so many nats a token."""
    correct = np.arange(NUM_ITEMS) >= wrong
    ids = np.array([f"demo_facts:{number}:x" for number in range(NUM_ITEMS)])
    items = ItemScores(ids, correct, np.zeros(NUM_ITEMS), np.zeros((NUM_ITEMS, 2)))
    Scores({"demo_facts": TaskScore("demo_facts", "acc", 0, 0, NUM_ITEMS, items)}, {}).save(folder)
    read = (LENGTH * (nats + noise.normal(0, 1e-3, NUM_SEQUENCES))).tolist()
    score = TextScore(
        text="0" * 64, nats=[[each, 0, 0] for each in read], num_targets=[[LENGTH, 0, 0]] * NUM_SEQUENCES,
        entropy=5.0, uniform=6.0,
    )  # fmt: skip
    write_json(folder / TEXT_FILE, TextScores(texts={"held-out": score, "known": score}))


def write_studies(folder: Path, of: Recipe, seeds: Sequence[int] = (0, 1)) -> list[StudyFolder]:
    """In which only the INT8 arms lose anything: 8 items and 0.03 nats by calibration alone, half of it by QAT."""
    studies = [StudyFolder(folder / f"seed-{seed}") for seed in seeds]
    noise = np.random.default_rng(0)
    for study in studies:
        for name in (START, *of.arm_names):
            wrong, nats = {"int8-ptq": (48, 1.03), "int8-qat": (44, 1.015)}.get(name, (40, 1.0))
            write_scored(study.arm(name).path / "eval", wrong, nats, noise)
    return studies


def test_what_finished_studies_say(tmp_path: Path) -> None:
    of = recipe("fine-tune", tmp_path)
    studies = write_studies(tmp_path, of)
    cells = {
        (c.format, c.method, c.against, c.measure): c for c in cells_of("fine-tune", "demo", studies, answers=True)
    }
    lost = cells["int8", "ptq", "bf16", "items"]
    assert (lost.value, lost.num, lost.seeds) == (pytest.approx(100 * 8 / NUM_ITEMS), NUM_ITEMS, 2)
    text = cells["int8", "ptq", "bf16", "own text"]
    assert text.value == pytest.approx(100 * (np.exp(0.03) - 1), abs=0.1)
    assert (text.num, 0 < text.low < text.value < text.high) == (NUM_SEQUENCES * LENGTH, True)
    assert cells["hif8", "mix", "bf16", "items"].value == 0
    # Against calibration alone it says what the study's own line says.
    for found in over_ptq(of, studies):
        format, _, method = found.qat.partition("-")
        of_pair = (format, method, found.ptq.removeprefix(f"{format}-"))
        items, rise = cells[*of_pair, "items"], cells[*of_pair, "new text"]
        assert (-items.value, [-items.high, -items.low]) == (found.accuracy_pp, pytest.approx(found.ci_accuracy_pp))
        assert (rise.value, [rise.low, rise.high]) == (found.perplexity_percent, found.ci_perplexity_percent)
    beaten = [found.answer for found in over_ptq(of, studies) if (found.qat, found.ptq) == ("int8-qat", "int8-ptq")]
    assert beaten == ["QAT beats PTQ by perplexity"]


def test_a_model_that_cannot_answer_and_a_text_that_is_not_new(tmp_path: Path) -> None:
    studies = write_studies(tmp_path, recipe("smaller", tmp_path), seeds=(0,))
    cells = list(cells_of("smaller", "gut3m", studies, answers=False))
    assert {cell.measure for cell in cells} == {"own text"}
    assert {cell.against for cell in cells if cell.confidence == 0.95} == {START}
    assert {cell.method for cell in cells if not cell.format} == {"qat", "qad"}


def a_cell(model: str, value: float, question: str = "smaller") -> Cell:
    return Cell(question, model, "int8", "ptq", "start", 1, "own text", 16_256, value, value - 1, value + 1, 0.95)


def test_the_table_is_made_of_the_file_and_a_new_run_takes_the_place_of_an_older(tmp_path: Path) -> None:
    keep(tmp_path / FILE, [a_cell("demo", 1.0)])
    keep(tmp_path / FILE, [a_cell("code", 2.0)])
    keep(tmp_path / FILE, [a_cell("demo", 3.0)])
    assert read_cells(tmp_path / FILE) == [a_cell("code", 2.0), a_cell("demo", 3.0)]
    assert "| demo | ptq against start |  |  |  | +3.00 [+2.00, +4.00] |" in tables(read_cells(tmp_path / FILE))


def test_without_a_twin_a_trained_arm_stands_against_the_calibrated_start_model(tmp_path: Path) -> None:
    arms = {"int8-qat": {}, "int8-ptq": {"method": "ptq"}, "hif8-ptq": {"method": "ptq", "qat": {"format": "hif8"}}}
    whole = recipe("smaller", tmp_path).model_dump(mode="json")
    of = parse_recipe(whole | {"arms": arms, "qat": {"format": "int8"}})
    (found,) = over_ptq(of, write_studies(tmp_path, of))
    assert (found.qat, found.ptq, found.has_twin) == ("int8-qat", "int8-ptq", False)
    (line,) = over_ptq_lines([found])
    assert line.endswith("; int8-qat has no BF16 twin, so what training itself did is in it")


def test_the_note_shows_what_the_script_said() -> None:
    said = tables(read_cells(ROOT / "scripts/bench_results" / FILE)).splitlines()
    note = (ROOT / "docs/ptq.md").read_text(encoding="utf-8").splitlines()
    shown = [line for line in note if " against " in line and line.startswith("| ")]
    assert len(shown) > 20
    assert set(shown) <= set(said)
