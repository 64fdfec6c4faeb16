"""What the page promises: no green beside an alarm or what was not shown, words explained, numbers that travel with it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_study import Shape, write_study

from qatrun.layout import StudyFolder
from qatrun.report.page.glossary import GLOSSARY, explained
from qatrun.study.page import write_page

SMALL = Shape(steps=40, warmup=10, blocks=1, arms=("bf16", "hif8"), broken=False)


def page_of(folder: Path, change: Callable[[Path], object] = lambda _: None) -> str:
    study = write_study(folder / "study", SMALL)
    change(study)
    return write_page(StudyFolder(study)).read_text(encoding="utf-8")


def not_shown(study: Path) -> None:
    file = study / "diagnosis.json"
    diagnosis = json.loads(file.read_text(encoding="utf-8"))
    cause = {"answer": "not shown", "could_hide": 0.171, "unit": "nats a token", "looks": []}
    diagnosis["arms"]["hif8"]["causes"]["forgetting"] = cause
    file.write_text(json.dumps(diagnosis), encoding="utf-8")


def alarmed(study: Path) -> None:
    row = {"step": 30, "kind": "saturation", "text": "step 30: it clips"}
    (study / "bf16/alarms.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (not_shown, "Forgetting not shown: up to 0.17 nats a token could hide"),
        (alarmed, '<span class="state warn">Within budget</span><span class="state alarm">1 alarm</span>'),
    ],
)
def test_what_stands_open_is_amber(tmp_path: Path, change: Callable[[Path], object], says: str) -> None:
    page = page_of(tmp_path, change)
    top = page[page.index("<h1>") : page.index('<section id="diagnosis"')]
    assert says in top
    assert '<strong class="warn">' in top
    assert '<strong class="good">' not in top
    assert "Ship it" not in top
    assert "Nothing broke" not in top or '<span class="state good">Nothing broke' not in top


def test_the_total_stands_first_and_the_recipe_is_folded(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    tiles = re.findall(r'<li class="(\w+)"><span class="what">', page)
    assert tiles[:2] == ["accuracy", "perplexity"]
    assert tiles[-2:] == ["budget", "next"]
    assert "`" not in page[page.index("<h1>") : page.index('<section id="diagnosis"')]
    assert page.index('<section id="total"') < page.index('<section id="diagnosis"')
    assert page.index("figure-waterfall") < page.index('<section id="diagnosis"')
    recipe = page[page.index('<section id="recipe"') :]
    assert recipe.index("<details>") < recipe.index("<pre")


def test_every_number_is_in_the_file_itself(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    inside = dict(re.findall(r'download="([\w.-]+)\.gz" href="data:application/gzip;base64,([^"]+)"', page))
    written = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "study/report").glob("*.csv")}
    assert inside.keys() == written.keys()
    assert all(gzip.decompress(base64.b64decode(data)).decode() == written[name] for name, data in inside.items())


def test_words_are_explained_once_a_text_and_nothing_else_is_touched() -> None:
    text = str(explained("0.1 pp, 2 pp and <b> of the twin; twins, demo.pp/x and pp_y"))
    assert text.count("<abbr") == 2
    assert text.startswith(f'0.1 <abbr title="{GLOSSARY["pp"].replace(":", ":")}">pp</abbr>, 2 pp and &lt;b&gt;')


@pytest.mark.parametrize("kind", ["clip", "overshoot"])
def test_what_is_harmless_has_no_colour(kind: str) -> None:
    import numpy as np

    from qatrun.report.page.heatmap import CLIPPING, LIGHT, OVERSHOOT

    measure, harmless = {"clip": (CLIPPING, [0.0, 1e-4, 1e-3]), "overshoot": (OVERSHOOT, [0.9, 1.3, 2.0])}[kind]
    colors = [LIGHT[place] for place in measure.classes(np.array(harmless))]
    assert all(_saturation(color) < 0.05 for color in colors)
    assert _saturation(LIGHT[measure.classes(np.array([0.05 if kind == "clip" else 20.0]))[0]]) > 0.3


def _saturation(color: str) -> Any:
    channels = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    return (max(channels) - min(channels)) / max(channels)
