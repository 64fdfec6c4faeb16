"""The arms of each study, and how they are run.

Every study trains 60 steps of 8 x 128 tokens, the first 20 in BF16. An arm is named `<format>-<fault>`; its twin has the
same rate. Faults are few where the format hardly matters, and in all three formats where it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from faults import planted
from faults.cells import Cell
from faults.labels import DAMAGED, Judge
from faults.models import SCORED, Kind, Subject, documents, write_documents
from qatrun.errors import DamagedFileError
from qatrun.layout import StudyFolder
from qatrun.recipe import Arm, Recipe, Source, parse_recipe
from qatrun.records.diagnosis import ArmDiagnosis
from qatrun.study import preflight, run_study
from qatrun.study.diagnose import diagnose
from qatrun.study.display import Display
from qatrun.study.records import first_alarms
from qatrun.tokenizer import load_tokenizer

FORMATS = ("hif8", "fp8_e4m3", "int8")
STEPS, WARMUP, BATCH, SEQ_LEN, PROBED = 60, 20, 8, 128, 10
BURST_EVERY = 10
# The first amax is pushed in the last step before the switch, so renewals follow the steps that end in 8.
QUIET_STEPS = range((WARMUP + BURST_EVERY - 2) % BURST_EVERY, STEPS, BURST_EVERY)
STALE = {"algorithm": "most_recent", "window": 1, "update_interval": BURST_EVERY}


@dataclass(frozen=True)
class Fault:
    """What is planted in an arm beside what its study is about.

    Attributes:
        causes: of quantization, that it may become; whether it does any harm is measured.
        rate: which of the subject's.
        too_small: factor by which scales are.
        acts_at: first step that it can be seen after.
    """

    causes: tuple[str, ...] = ()
    rate: str = "sane"
    too_small: int = 1
    qat: Mapping[str, Any] = field(default_factory=dict)
    acts_at: int = 0


AT_TARGET = {"clip": "target"}
FAULTS = {
    "none": Fault(),
    "high": Fault(rate="high"),
    "mild": Fault(rate="mild"),
    "hot": Fault(rate="hot"),
    "ruin": Fault(rate="ruin"),
    "scale-2x": Fault(("saturation",), "sane", 2, AT_TARGET, WARMUP),
    "scale-4x": Fault(("saturation",), "sane", 4, AT_TARGET, WARMUP),
    "scale-8x": Fault(("saturation",), "sane", 8, AT_TARGET, WARMUP),
    "lag-8x": Fault((), "sane", 8, {"clip": "format"}, WARMUP),  # nothing clips
    "both": Fault(("saturation",), "hot", 8, AT_TARGET),
    "burst": Fault(("saturation",), qat={"scaling": STALE, **AT_TARGET}, acts_at=QUIET_STEPS[2] + 1),
    "outlier": Fault(("resolution",), acts_at=WARMUP),
    "outlier-ruin": Fault(("resolution",), "ruin"),
    "words": Fault(),
    "characters": Fault(),
    "tokenizer": Fault(),
    DAMAGED: Fault(),
}


@dataclass(frozen=True)
class Study:
    """Arms that share model and text.

    Attributes:
        text: kind that is trained on; with `garbage` it is that instead.
        probe: whether the recipe names text that the model knew.
        arms: fault -> formats.
    """

    name: str
    text: Kind
    probe: bool
    arms: Mapping[str, tuple[str, ...]]
    garbage: str = ""


STUDIES = (
    Study(
        "own",
        "own",
        False,
        {"none": FORMATS, "high": ("hif8",), "ruin": ("fp8_e4m3",)},
    ),
    Study(
        "new",
        "new",
        True,
        {
            "none": FORMATS,
            "mild": ("hif8",),
            "hot": ("fp8_e4m3",),
            "scale-2x": ("int8",),
            "scale-8x": FORMATS,
            "lag-8x": ("hif8",),
            "both": ("int8",),
        },
    ),
    Study("burst", "own", True, {"burst": FORMATS}),
    Study("outlier", "own", False, {"outlier": FORMATS, "outlier-ruin": ("int8",)}),
    Study("blind", "new", False, {"none": ("hif8",), "mild": ("fp8_e4m3",), "hot": ("int8",), "scale-4x": ("hif8",)}),
    Study("words", "own", True, {"words": ("hif8",)}, garbage="words"),
    Study("characters", "own", False, {"characters": ("int8",)}, garbage="characters"),
    Study("tokenizer", "own", False, {"tokenizer": ("hif8",)}),
)


def recipe_of(study: Study, subject: Subject, seed: int, output: Path, factors: Collection[int]) -> Recipe:
    """A study's recipe.

    Args:
        output: folder of the subject's texts and models; studies go below it, by seed.
        factors: arms whose scales are too small by another factor are left out.
    """
    arms: dict[str, Any] = {}
    for fault, formats in study.arms.items():
        planned = FAULTS[fault]
        twin = "bf16" if planned.rate == "sane" else f"bf16-{planned.rate}"
        rate = {"train": {"learning_rate": subject.rates[planned.rate]}}
        arms.setdefault(twin, {"qat": None, **rate})
        if planned.too_small in factors:
            arms |= {f"{f}-{fault}": {"twin": twin, "qat": {"format": f, **planned.qat}, **rate} for f in formats}
    return parse_recipe(
        {
            "name": study.name,
            "output_dir": str(output / f"seed-{seed}"),
            "model": {"path": model_of(study, subject, output)},
            "data": data_of(study, subject, seed, output),
            "train": {
                "steps": STEPS,
                "global_batch_size": BATCH,
                "micro_batch_size": BATCH,
                "lr_warmup_steps": 10,
                "seed": seed,
                "save_every": STEPS,
            },
            "warmup": {"steps": WARMUP},
            "qat": {"scaling": {"window": WARMUP}},
            "monitor": {"probe": {"every": PROBED, "sequences": 8}, "sqnr_every": PROBED},
            "arms": arms,
            "eval": {"tasks": subject.tasks, "limit": SCORED, "data_dir": subject.data_dir, "batch_size": 64},
            "diagnose": {"at_end": False, "calibration_sequences": 32},
        }
    )


def model_of(study: Study, subject: Subject, output: Path) -> str:
    """The start model's path."""
    if study.name == "outlier":
        return str(planted.outlier_model(subject.config, output / "outlier-model"))
    if study.name == "tokenizer":
        return str(planted.mistaken_model(subject.config, output / "mistaken-model"))
    return subject.model


def data_of(study: Study, subject: Subject, seed: int, output: Path) -> dict[str, Any]:
    """The recipe's `data`."""
    train, valid = subject.text(study.text, "train"), subject.text(study.text, "valid")
    found: dict[str, Any] = {"train": train, "valid": valid}
    if study.garbage:
        file = output / "texts" / f"{study.garbage}-{seed}.jsonl"
        if not file.is_file():
            write_documents(file, planted.GARBAGE[study.garbage](_words(Path(train.path)), seed))
        found = {"train": Source(path=str(file))}
    if study.name == "burst":
        found["train"] = _bursty_text(subject, seed, output / "texts" / f"burst-{seed}.jsonl")
    if study.probe:
        found["probe"] = subject.text("own", "valid")
    return {key: source.model_dump(mode="json") for key, source in found.items()} | {
        "seq_len": SEQ_LEN,
        "valid_sequences": 64,
    }


def _words(file: Path) -> list[str]:
    """Of its first documents, the commonest first."""
    counts = Counter(word for text in islice(documents(file), 300) for word in text.split() if word.isalpha())
    return [word for word, _ in counts.most_common()]


def _bursty_text(subject: Subject, seed: int, file: Path) -> Source:
    if not file.is_file():
        tokenizer = load_tokenizer(subject.config)
        source = Path(subject.text("own", "train").path)
        word = planted.quiet_words(subject.config, _words(source))[seed % 4]
        texts = islice(documents(source), 200 * (seed % 8), None)
        rows = planted.bursty(
            texts, word, QUIET_STEPS, BATCH * SEQ_LEN, lambda text: len(tokenizer(text, verbose=False)["input_ids"]) + 1
        )
        write_documents(file, rows)
    return Source(path=str(file), shuffle=False)


def run(study: Study, subject: Subject, judge: Judge, seed: int, output: Path, display: Display) -> list[Cell]:
    """Train, score, diagnose and measure the arms of a study."""
    folder = StudyFolder(output / f"seed-{seed}" / study.name)
    factors = sorted({FAULTS[fault].too_small for fault in study.arms})
    recipe = recipe_of(study, subject, seed, output, factors)
    for number, factor in enumerate(
        factors, start=1
    ):  # each with the arms before it: a study takes more arms, not fewer
        part = recipe_of(study, subject, seed, output, factors[:number])
        if not (recipe.arms.keys() - part.arms.keys()) & folder.begun:
            with planted.underestimated(factor):
                run_study(part, display, resume=True)
    found = diagnose(folder, display)
    warned = [str(warning) for warning in preflight(recipe).warnings if warning.key.startswith("data.")]
    cells = [
        _cell(study, subject, seed, arm, folder, found.arms[arm.name], judge, warned)
        for arm in recipe.arm_by_name.values()
        if arm.twin is not None
    ]
    return [*cells, _damaged(cells[0], folder, display)] if study.name == "own" else cells


def _cell(
    study: Study,
    subject: Subject,
    seed: int,
    arm: Arm,
    folder: StudyFolder,
    found: ArmDiagnosis,
    judge: Judge,
    warned: list[str],
) -> Cell:
    format, _, fault = arm.name.partition("-")
    return Cell(
        model=subject.name,
        seed=seed,
        study=study.name,
        arm=arm.name,
        format=format,
        fault=fault,
        text=study.text,
        probe=study.probe,
        start=judge.plain(arm.model.path),
        twin=judge.plain(str(folder.arm(str(arm.twin)).path)),
        on=judge.quantized(folder.arm(arm.name).quantized),
        answer_tokens=judge.answer_tokens,
        answers=found.causes,
        sentence=found.sentence,
        warned=warned,
        alarms=first_alarms(folder.arm(arm.name)),
    )


def _damaged(cell: Cell, folder: StudyFolder, display: Display) -> Cell:
    """The cell with one of its layers damaged after it was scored."""
    weights = folder.arm(cell.arm).quantized / "model.safetensors"
    before = planted.damage(weights)
    try:
        diagnose(folder, display)
        refused = ""
    except DamagedFileError as error:
        refused = str(error)
    finally:
        weights.write_bytes(before)
    changes = {"arm": f"{cell.format}-{DAMAGED}", "fault": DAMAGED, "answers": {}, "sentence": "", "refused": refused}
    return cell.model_copy(update=changes)
