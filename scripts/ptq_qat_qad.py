"""PTQ beside QAT beside QAD on four models, in three formats, with paired intervals. Two questions, kept apart:

    smaller      the model is good as it is: everything is held against the start model, and trained on text of its own kind
    fine-tune    it learns new text anyway: everything is held against the BF16 twin, which learns the same

    python scripts/ptq_qat_qad.py --output FOLDER                          # demo, code, demo-outliers: which need nothing
    python scripts/ptq_qat_qad.py --output FOLDER --shared MODELS           # and gut3m
    python scripts/ptq_qat_qad.py --output FOLDER --models demo --seeds 3   # what is finished is kept, and used again

One study answers a question for a model. What comes out is in FOLDER/ptq_qat_qad.csv, and printed as Markdown.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import transformers
from rich.console import Console

from faults import small
from faults.models import SUBJECTS, Kind, Subject, documents
from faults.planted import outlier_model
from faults.studies import BATCH, FORMATS, SEQ_LEN, STEPS
from qatrun import demo
from qatrun.evaluate.attribution import HELD_OUT, KNOWN
from qatrun.evaluate.replication import correct_of_seeds, difference, text_rise
from qatrun.evaluate.scores import Scores
from qatrun.evaluate.text import load_texts, perplexity
from qatrun.layout import START, StudyFolder
from qatrun.recipe import Recipe, parse_recipe
from qatrun.report import TerminalDisplay
from qatrun.study import run_study
from qatrun.study.over_ptq import CONFIDENCE

FILE = "ptq_qat_qad.csv"
ITEMS = 400  # a task, of models that can answer any
CALIBRATIONS: Mapping[str, Mapping[str, Any]] = {
    "ptq": {},
    "ptq-fitted": {"calibration": {"input": "mse", "smooth": 0.5}},
    "ptq-token": {"input": {"granularity": "per_token"}},
}


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        text: kind that is trained on.
        reference: what everything is held against.
        distilled: name of the arms that learn from the start model, and how much of their loss that is.
    """

    text: Kind
    reference: str
    distilled: str
    weight: float


QUESTIONS = {
    "smaller": Question("own", START, "qad", 1.0),
    "fine-tune": Question("new", "bf16", "mix", 0.5),
}


class Cell(NamedTuple):
    """What is lost from one model to another by one measure, with its paired interval; below 0 something is won.

    Attributes:
        format: empty of a model that is not quantized.
        measure: "own text" and "new text": rise of perplexity, percent; "items": drop of accuracy, percentage points.
        num: tokens, or items.
        confidence: of the interval; of two such that hold together at 0.95 where a trained arm is held against a calibrated
            one, as a study's qat_ptq.csv has them.
    """

    question: str
    model: str
    format: str
    method: str
    against: str
    seeds: int
    measure: str
    num: int
    value: float
    low: float
    high: float
    confidence: float


def outliers(folder: Path, shared: Path | None) -> Subject:
    """The demo with planted outlier channels: the same function, which one scale a tensor cannot hold in INT8."""
    found = with_all_questions(folder, shared)
    return replace(found, name="demo-outliers", model=str(outlier_model(found.config, folder / "model")))


def with_all_questions(folder: Path, shared: Path | None) -> Subject:
    """The demo with its own tasks, of which the first items are asked: those about what it knows best."""
    return replace(SUBJECTS["demo"](folder, shared), tasks=dict.fromkeys(demo.TASKS, 0))


def coder(folder: Path, shared: Path | None) -> Subject:
    """With more questions than the fault bench asks."""
    found = SUBJECTS["code"](folder, shared)
    items = small.what_comes_next(documents(found.texts / "own-valid.jsonl"), ITEMS)
    return replace(found, tasks={str(small.write_task(folder / f"task-{ITEMS}", items)): 0})


MODELS = {"demo": with_all_questions, "code": coder, "gut3m": SUBJECTS["gut3m"], "demo-outliers": outliers}


def recipe_of(name: str, subject: Subject, output: Path, seeds: int, steps: int) -> Recipe:
    """The study that answers a question for a model."""
    question = QUESTIONS[name]
    parts = {part: subject.text(question.text, part) for part in ("train", "valid")}
    data = {part: source.model_dump(mode="json") for part, source in parts.items()}
    return parse_recipe(
        {
            "name": name,
            "output_dir": str(output),
            "model": {"path": subject.model},
            "data": data
            | {
                "probe": subject.text("own", "valid").model_dump(mode="json"),
                "seq_len": SEQ_LEN,
                "valid_sequences": 64,
            },
            "train": {
                "steps": steps,
                "global_batch_size": BATCH,
                "micro_batch_size": BATCH,
                "learning_rate": subject.rates["sane"],
                "lr_warmup_steps": steps // 6,
                "seeds": list(range(seeds)),
                "save_every": steps,
            },
            "warmup": {"steps": steps // 3},
            "qat": {"scaling": {"window": max(1, steps // 3)}},
            "monitor": {"probe": None, "sqnr_every": None},
            "arms": _arms(question),
            "eval": {
                "tasks": subject.tasks,
                "limit": ITEMS if subject.questions else 4,
                "data_dir": subject.data_dir,
                "batch_size": 64,
            },
            "diagnose": {"at_end": False},
        }
    )


def _arms(question: Question) -> dict[str, Any]:
    taught = {"train": {"distill": {"weight": question.weight}}}
    arms: dict[str, Any] = {"bf16": {"qat": None}, f"bf16-{question.distilled}": {"qat": None, **taught}}
    for format in FORMATS:
        for method, how in CALIBRATIONS.items():
            qat = {"format": format, **how}
            arms[f"{format}-{method}"] = {"method": "ptq", "twin": question.reference, "qat": qat}
        arms[f"{format}-qat"] = {"twin": "bf16", "qat": {"format": format}}
        arms[f"{format}-{question.distilled}"] = {
            "twin": f"bf16-{question.distilled}",
            "qat": {"format": format},
            **taught,
        }
    return arms


def cells_of(name: str, model: str, studies: Sequence[StudyFolder], *, answers: bool) -> Iterator[Cell]:
    """What finished studies, one for each seed, say together: every arm against the reference, and every trained one against
    every calibrated one of its format.

    Args:
        answers: whether the model can answer items at all.
    """
    question = QUESTIONS[name]
    trained = ("qat", question.distilled)

    def cells(format: str, method: str, before: str, after: str, confidence: float = 0.95) -> Iterator[Cell]:
        against = before.removeprefix(f"{format}-")
        for found in _measured(studies, before, after, confidence):
            if (answers or found[0] != "items") and (question.text == "new" or found[0] != "new text"):
                yield Cell(name, model, format, method, against, len(studies), *found, confidence)

    for method, arm in zip(trained, ("bf16", f"bf16-{question.distilled}"), strict=True):
        if arm != question.reference:
            yield from cells("", method, question.reference, arm)
    for format in FORMATS:
        for method in (*CALIBRATIONS, *trained):
            yield from cells(format, method, question.reference, f"{format}-{method}")
        for method in trained:
            for other in CALIBRATIONS:
                yield from cells(format, method, f"{format}-{other}", f"{format}-{method}", CONFIDENCE)


def _measured(
    studies: Sequence[StudyFolder], before: str, after: str, confidence: float
) -> Iterator[tuple[str, int, float, float, float]]:
    """(measure, num, value, low, high), by the statistics of a study over seeds."""
    folders = [[study.arm(arm).eval for study in studies] for arm in (before, after)]
    for measure, text in {"own text": KNOWN, "new text": HELD_OUT}.items():
        read = [[load_texts(folder).texts[text] for folder in of_arm] for of_arm in folders]
        rise = text_rise(*read)
        assert rise is not None  # all read one text
        value, low, high = (100 * (perplexity(nats) - 1) for nats in (rise.of_text.mean, *rise.interval(confidence)))
        yield measure, sum(map(sum, read[0][0].num_targets)), value, low, high
    scores = [[Scores.load(folder) for folder in of_arm] for of_arm in folders]
    first, second = (correct_of_seeds(of_arm, list(scores[0][0].tasks)) for of_arm in scores)
    drop = difference(first, second, confidence)
    yield "items", first.shape[1], 100 * drop.mean, 100 * drop.interval[0], 100 * drop.interval[1]


def read_cells(file: Path) -> list[Cell]:
    """Of ptq_qat_qad.csv; none where there is no such file."""
    if not file.is_file():
        return []
    kinds = get_type_hints(Cell)
    with file.open(newline="", encoding="utf-8") as opened:
        return [Cell(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(opened)]


def keep(file: Path, new: Sequence[Cell]) -> None:
    """In place of what the file has of the same models and questions."""
    made = {(cell.model, cell.question) for cell in new}
    cells = [cell for cell in read_cells(file) if (cell.model, cell.question) not in made]
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(Cell._fields)
        writer.writerows([round(x, 4) if isinstance(x, float) else x for x in cell] for cell in (*cells, *new))


def tables(cells: Sequence[Cell]) -> str:
    """As Markdown, one for each question and measure."""
    kinds = dict.fromkeys((cell.question, cell.measure) for cell in cells)
    return "\n".join(
        _table([cell for cell in cells if (cell.question, cell.measure) == kind], f"{kind[0]}, {kind[1]}")
        for kind in kinds
    )


def _table(cells: Sequence[Cell], title: str) -> str:
    """What is held against the reference, then trained arms against calibrated ones."""
    formats = ("", *FORMATS)
    lines = [f"| {title} | | not quantized | {' | '.join(FORMATS)} |", f"|{'---|' * (2 + len(formats))}"]
    rows: dict[tuple[str, str, str], dict[str, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.confidence):
        rows.setdefault((cell.model, cell.method, cell.against), {})[cell.format] = cell
    for (model, method, against), found in rows.items():
        values = (_shown(found[format]) if format in found else "" for format in formats)
        lines.append(f"| {model} | {method} against {against} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _shown(cell: Cell) -> str:
    return f"{cell.value:+.2f} [{cell.low:+.2f}, {cell.high:+.2f}]"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="what is made is kept, and used again"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS), help="questions")
    parser.add_argument("--seeds", type=int, default=1, help="of training; may be raised later")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--shared", type=Path, metavar="DIR", help="folder with models/, text/ and data/")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    transformers.logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 200)
    output = arguments.output.resolve()
    for model in arguments.models:
        try:
            subject = MODELS[model](output / model, arguments.shared)
        except FileNotFoundError as error:
            console.print(str(error), markup=False)
            continue
        for name in arguments.only:
            recipe = recipe_of(name, subject, output / model, arguments.seeds, arguments.steps)
            with TerminalDisplay(console) as display:
                folder = StudyFolder(run_study(recipe, display, resume=True).folder)
            keep(output / FILE, list(cells_of(name, model, folder.replicas, answers=bool(subject.questions))))
    print(tables(read_cells(output / FILE)))


if __name__ == "__main__":
    main()
