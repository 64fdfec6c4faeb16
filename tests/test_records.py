"""Records: what is read is what is written, and neither is anything else than the record says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from page_seeds import write_seeds
from page_study import Shape, write_study
from pydantic import ValidationError

from qatrun.evaluate.scores import ItemScores
from qatrun.files import Record, read_json, write_json
from qatrun.records.comparison import Cost, StudyComparison
from qatrun.records.diagnosis import Effect, StudyDiagnosis
from qatrun.records.environment import Environment, StudyEnvironment
from qatrun.records.quantized import Histograms
from qatrun.records.seeds import Seeds
from qatrun.records.training import ArmResult, Result

MATCH = {"model": {"path": "m"}, "steps": 4, "learning_rate": 1e-3, "seed": 0, "data_hash": "f00d"}
ARM = {
    "arm": "hif8",
    "twin": "bf16",
    "match": MATCH,
    "cost": {"seconds": 1.5, "peak_memory_bytes": 1},
    "coverage": None,
    "perplexity": {"on": 2.0, "off": 3},
    "sizes": {"plain_bytes": 2},
    "weights": {},
}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    write_study(folder / "one", Shape(steps=20, warmup=5, blocks=1))
    write_seeds(folder / "many")
    (folder / "arm.json").write_text(json.dumps(ARM), encoding="utf-8")
    later = {"date": "2030", "of a later version": {"x": [1, None]}, "packages": {}}
    (folder / "later.json").write_text(json.dumps(later), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("one/comparison.json", StudyComparison),
        ("one/diagnosis.json", StudyDiagnosis),
        ("one/environment.json", Environment),
        ("one/hif8/result.json", Result),
        ("one/hif8/histograms.json", Histograms),
        ("many/seeds.json", Seeds),
        ("arm.json", ArmResult),
        ("later.json", Environment),
    ],
)
def test_what_is_read_is_written_as_it_was(studies: Path, tmp_path: Path, name: str, kind: type[Record]) -> None:
    record = read_json(studies / name, kind)
    write_json(tmp_path / "again.json", record)
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((studies / name).read_text())
    assert read_json(tmp_path / "again.json", kind) == record


def test_a_match_keeps_its_order_which_is_that_of_the_mismatches() -> None:
    assert list(ArmResult.model_validate(ARM).to_dict()["match"]) == list(MATCH)


def test_fields_are_written_in_the_order_of_the_record() -> None:
    given = {"packages": {}, "platform": "p", "command": [], "date": "d"}
    assert list(StudyEnvironment.model_validate(given).to_dict()) == ["date", "command", "packages", "platform"]


def test_a_record_is_made_of_what_it_says_and_stays_that() -> None:
    with pytest.raises(ValidationError, match="peak_memory_bytes"):
        Cost(seconds=1.0, peak_memory_bytes=1.5)  # type: ignore[arg-type]
    cost = Cost(seconds=1.0, peak_memory_bytes=1)
    with pytest.raises(ValidationError, match="frozen"):
        cost.seconds = 2.0  # type: ignore[misc]


def test_an_effect_is_from_one_model_to_another() -> None:
    edges = [-np.inf, np.inf]
    effect = Effect(
        name="ptq",
        source="twin",
        target="ptq",
        drop_pp=0.0,
        ci95_pp=[0.0, 0.0],
        loglikelihood=0.0,
        ci95_loglikelihood=edges,
        text_loglikelihood=0.0,
        ci95_text_loglikelihood=edges,
        log_perplexity=None,
    )
    written = effect.to_dict()
    assert (written["from"], written["to"]) == ("twin", "ptq")
    assert written["ci95_loglikelihood"] == edges
    assert Effect.model_validate(json.loads(json.dumps(written))) == effect


def test_items_are_found_by_name() -> None:
    names = np.array(["b", "d", "a", "c"])
    items = ItemScores(names, np.array([True, False, True, False]), np.arange(4.0), np.zeros((4, 1)))
    assert names[items.places(np.array(["a", "b", "d"]))].tolist() == ["a", "b", "d"]
