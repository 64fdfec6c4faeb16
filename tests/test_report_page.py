"""The page: what it says, that its CSV files are what is drawn, that nothing in a name can hurt it, and its size."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from page_seeds import write_seeds
from page_study import Shape, write_study

from qatrun.errors import InputError
from qatrun.layout import StudyFolder
from qatrun.report.page.coverage import ranges
from qatrun.report.page.histograms import grid_counts, grid_magnitudes
from qatrun.report.page.scores import scores_figure
from qatrun.report.page.series import step_bins
from qatrun.report.page.study_page import figure_key
from qatrun.report.page.table import csv_text, shown, table
from qatrun.report.page.tensors import TensorStats
from qatrun.study.page import read_study, write_page
from qatrun.train.metrics import read_metrics
from qatrun.train.tensors import read_tensor_stats

LIMIT = 3_000_000
SMALL = Shape(steps=60, warmup=10, blocks=1)
HOSTILE = "\"'><script>alert(1)</script></svg>&amp;]]>"
HOSTILE_ARM = "=cmd|' <script>alert(2)<script>"  # a folder's name holds no slash
FIGURES = {"waterfall", "text-effects", "scores", "loss", "forgetting"}
OF_AN_ARM = {"saturation", "scale", "histograms"}


class Elements(HTMLParser):
    """Every tag of a page with its attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study with its page; to look at only."""
    folder = write_study(tmp_path_factory.mktemp("page") / "demo", SMALL)
    write_page(StudyFolder(folder))
    return folder


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one quantized arm."""
    folder = write_study(tmp_path_factory.mktemp("smaller") / "demo", replace(SMALL, arms=("bf16", "hif8")))
    write_page(StudyFolder(folder))
    return folder


@pytest.fixture
def study(smaller: Path, tmp_path: Path) -> Path:
    """A copy of the smaller study, which a test may change."""
    return Path(shutil.copytree(smaller, tmp_path / "demo"))


def page_of(folder: Path) -> str:
    return write_page(StudyFolder(folder)).read_text(encoding="utf-8")


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "report" / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def svgs(page: str) -> Iterator[str]:
    yield from re.findall(r"<svg.*?</svg>", page, re.DOTALL)


# ---- what the page says ----


def test_sections_come_in_order_and_every_figure_is_there(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<section id="([^"]+)"', page) == [
        *("total", "diagnosis", "scores", "loss", "saturation", "scale", "forgetting", "histograms"),
        *("coverage", "alarms", "differences", "recipe", "environment", "glossary"),
    ]
    figures = set(re.findall(r'<figure id="figure-([^"]+)"', page))
    assert figures == FIGURES | {f"{kind}-{arm}" for kind in OF_AN_ARM for arm in ("hif8", "int8")}
    assert all((finished / "report" / f"{figure}.csv").is_file() for figure in figures)


def test_verdict_and_diagnosis_stand_first_in_word_and_colour(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    top = page[page.index("<h1>") : page.index("<section")]
    assert '<span class="state bad">Exceeds its budget</span>' in top
    assert '<span class="state bad">Saturation</span>' in top
    assert '<span class="state good">Nothing broke</span>' in top
    text = "".join(Elements(top).words)
    assert f"model.layers.0.self_attn.q_proj:input clips 1.2 % of its values since step {SMALL.fault_step}" in text
    assert "Conditional on these checkpoints" in text


def test_a_healthy_study_says_so(tmp_path: Path) -> None:
    shape = Shape(steps=40, warmup=10, blocks=1, arms=("bf16", "hif8"), broken=False)
    page = page_of(write_study(tmp_path / "healthy", shape))
    assert '<span class="state good">Within budget</span>' in page
    assert '<span class="state good">Nothing broke</span>' in page
    assert "hif8 clips nothing; the largest overshoot is" in "".join(Elements(page).words)
    assert "No alarm was raised." in page
    assert 'class="state bad"' not in page


@pytest.mark.parametrize(
    ("gone", "said", "without"),
    [
        ("diagnosis.json", "The study was not diagnosed", {"text-effects"}),
        ("*/tensors/*", "No statistics of quantized tensors were recorded", {"saturation-hif8", "scale-hif8"}),
        ("*/histograms.json", "No histograms of values were recorded", {"histograms-hif8"}),
        ("comparison.json", "No arm was compared with a BF16 twin", {"scores", "waterfall"}),
        ("*/metrics.jsonl", "No training record", {"loss", "forgetting"}),
        ("environment.json", "What it ran on was not recorded", set()),
        ("*/quantized/plan.json", "Which linears they are was not recorded", set()),
        ("*/alarms.jsonl", "No alarm was raised.", set()),
    ],
)
def test_what_is_missing_is_left_out_with_a_line(study: Path, gone: str, said: str, without: set[str]) -> None:
    for file in study.glob(gone):
        file.unlink()
    page = page_of(study)
    assert said in "".join(Elements(page).words)
    left = set(re.findall(r'<figure id="figure-([^"]+)"', page))
    assert not without & left
    assert not any((study / "report" / f"{name}.csv").exists() for name in without)


def test_an_older_study_without_a_probe_has_no_forgetting_curve(study: Path) -> None:
    for file in study.glob("*/metrics.jsonl"):
        rows = [{key: row[key] for key in row if not key.startswith("kl_")} for row in read_metrics(file)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = page_of(study)
    assert "No step was probed in this study" in page
    assert "figure-loss" in page


def test_a_study_of_bf16_arms_only(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "bf16", Shape(steps=20, warmup=5, blocks=1, arms=("bf16", "hif8")))
    shutil.rmtree(folder / "hif8")
    (folder / "diagnosis.json").unlink()
    (folder / "comparison.json").write_text('{"study": "bf16", "verdict": null, "pairs": []}', encoding="utf-8")
    text = "".join(Elements(page_of(folder)).words)
    assert "No verdict" in text
    assert "No arm quantizes anything." in text
    assert "no arm has a BF16 twin" in text


def test_no_study_and_a_damaged_one_are_errors(tmp_path: Path, study: Path) -> None:
    with pytest.raises(InputError, match="no study in"):
        write_page(StudyFolder(tmp_path))
    (study / "diagnosis.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"diagnosis\.json cannot be read"):
        write_page(StudyFolder(study))


def test_contrasts_of_a_study_with_one_seed(study: Path, tmp_path: Path) -> None:
    summary = json.loads((write_seeds(tmp_path / "seeds") / "seeds.json").read_text(encoding="utf-8"))
    contrast = summary["contrasts"][0] | {"per_seed_pp": [0.61], "loss_ape_percent": None}
    of_one = summary | {"seeds": [0], "arms": {}, "contrasts": [contrast]}
    (study / "seeds.json").write_text(json.dumps(of_one), encoding="utf-8")
    page = page_of(study)
    assert "figure-contrasts" in page
    assert contrast["answer"] in "".join(Elements(page).words)
    assert rows_of(study, "contrasts")[0]["seed 0 pp"] == "0.61"


def test_seeds(tmp_path: Path) -> None:
    folder = write_seeds(tmp_path / "ablation")
    page = page_of(folder)
    assert set(re.findall(r'<figure id="figure-([^"]+)"', page)) == {"accuracy", "drop", "contrasts", "damage"}
    assert '<a href="seed-0/report.html">' in page
    assert "seed-1" not in page  # has no folder
    assert (folder / "seed-0" / "report.html").is_file()
    text = "".join(Elements(page).words)
    assert "mathdefault" not in text
    assert "3 of 5 arms broke" in text
    assert "No effect shown: the max window could help by up to 1.15 pp" in text
    summary = json.loads((folder / "seeds.json").read_text(encoding="utf-8"))
    accuracies = [row for row in rows_of(folder, "accuracy") if row["arm"] == "ema" and row["task"] == "demo_facts"]
    expected = summary["arms"]["ema"]["tasks"]["demo_facts"]["accuracy"]
    assert [float(accuracies[0][f"seed {seed}"]) for seed in range(3)] == expected
    assert len(rows_of(folder, "damage")) == 9


# ---- the CSV files are what is drawn ----


def test_the_loss_and_its_error(finished: Path) -> None:
    rows = rows_of(finished, "loss")
    loss = {arm: [row["loss"] for row in read_metrics(finished / arm / "metrics.jsonl")] for arm in ("bf16", "int8")}
    assert [float(row["bf16 loss"]) for row in rows] == loss["bf16"]
    assert [float(row["int8 loss"]) for row in rows] == loss["int8"]
    error = 100 * np.abs(np.array(loss["int8"]) - loss["bf16"]) / loss["bf16"]
    assert [float(row["int8 APE %"]) for row in rows] == pytest.approx(error)


def test_the_heat_map_and_the_scales(finished: Path) -> None:
    stats = TensorStats.from_table(read_tensor_stats(finished / "int8"))
    name = "model.layers.0.self_attn.q_proj:input"
    rows = stats.of(name)
    heat = {row["tensor"]: row for row in rows_of(finished, "saturation-int8")}
    assert list(heat) == list(stats.names)
    drawn = [float(heat[name][f"step {step}"]) for step in stats.steps[rows]]
    assert drawn == stats.clip_fraction[rows].tolist()
    scale = [row for row in rows_of(finished, "scale-int8") if row["tensor"] == name]
    assert [float(row["amax"]) for row in scale] == stats.amax[rows].tolist()
    estimate = [float(row["amax that the scale stands for"]) for row in scale]
    assert estimate == pytest.approx((stats.amax / stats.overshoot)[rows])


def test_the_scores_histograms_and_probes(finished: Path) -> None:
    content = read_study(StudyFolder(finished))
    figure = scores_figure(content)
    assert figure is not None
    assert figure.csv == (finished / "report" / "scores.csv").read_text(encoding="utf-8")
    tasks = [task for pair in content.pairs for task in pair.comparison.tasks]
    assert [float(row["drop pp"]) for row in rows_of(finished, "scores")] == [task.drop_pp for task in tasks]
    entries = json.loads((finished / "int8" / "histograms.json").read_text(encoding="utf-8"))["tensors"]
    counts = [int(row["values"]) for row in rows_of(finished, "histograms-int8")]
    assert counts == [count for entry in entries for count in entry["counts"]]
    probed = [row for row in read_metrics(finished / "int8" / "metrics.jsonl") if "kl_on" in row]
    known = [row for row in rows_of(finished, "forgetting") if row["int8 KL, quantizers on"]]
    assert [float(row["int8 KL, quantizers on"]) for row in known] == [row["kl_on"] for row in probed]


def test_a_heat_map_of_many_steps_keeps_the_largest_value_of_each_column() -> None:
    bins = step_bins(np.arange(101, 1101), 200)
    assert (len(bins), bins.width, bins.last[0], bins.last[-1]) == (200, 5, 105, 1100)
    steps = np.array([101, 103, 105, 106, 1100])
    assert bins.index(steps).tolist() == [0, 0, 0, 1, 199]
    assert bins.mean(steps, np.array([1.0, 2.0, np.nan, 4.0, 5.0]))[[0, 1, 199]].tolist() == [1.5, 4.0, 5.0]
    stats = TensorStats(("x",), np.zeros(5, np.int64), steps, *(np.array([1.0, 7.0, 2.0, 3.0, np.nan]),) * 3)
    assert stats.largest(stats.amax, bins)[0, [0, 1]].tolist() == [7.0, 3.0]
    assert np.isnan(stats.largest(stats.amax, bins)[0, [2, 199]]).all()
    assert step_bins(np.array([50, 100, 150, 150]), 200).last.tolist() == [50, 100, 150]


@pytest.mark.parametrize(
    ("name", "num_values", "largest"), [("hif8", 126, 32768), ("fp8_e4m3", 126, 448), ("int8", 127, 127)]
)
def test_the_grid_under_a_histogram(name: str, num_values: int, largest: float) -> None:
    magnitudes = grid_magnitudes(name)
    assert (len(magnitudes), magnitudes[-1]) == (num_values, largest)
    edges = np.arange(-24.0, 17.0, 0.5)
    counts = dict(zip(edges, grid_counts(name, edges.tolist()), strict=False))
    assert sum(counts[edge] for edge in edges[:-1:2]) == num_values
    assert counts[1.0] == counts[1.5] == {"hif8": 8, "fp8_e4m3": 8, "int8": 2}[name]  # 2 <= x < 4


def test_under_an_asymmetric_tensor_the_integers_go_on_to_its_steps() -> None:
    assert grid_magnitudes("int8", 255.0).tolist() == list(range(1, 256))
    assert grid_counts("int8", [0.0, 6.0, 7.0, 8.0], 255.0).tolist() == [1, 64, 128]


# ---- nothing in a name can hurt ----


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of which every name and text is hostile."""
    arms, tasks = ("bf16", HOSTILE_ARM), (HOSTILE, "=1+1", "$\\frac{1}{0}$ \x00\u202e")
    shape = Shape(steps=30, warmup=10, blocks=1, arms=arms, prefix=f"{HOSTILE}.layers", tasks=tasks)
    folder = write_study(tmp_path_factory.mktemp("hostile") / "<script>alert(0)<script>", shape)
    alarm = {"step": 12, "kind": HOSTILE, "text": HOSTILE, "tensor": "@SUM(A1)"}
    (folder / HOSTILE_ARM / "alarms.jsonl").write_text(json.dumps(alarm) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(f"# {HOSTILE}\narms: {{}}\n", encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}), encoding="utf-8")
    diagnosis = json.loads((folder / "diagnosis.json").read_text(encoding="utf-8"))
    diagnosis["sentence"] = HOSTILE
    diagnosis["arms"][HOSTILE_ARM]["findings"] = [HOSTILE]
    (folder / "diagnosis.json").write_text(json.dumps(diagnosis), encoding="utf-8")
    write_page(StudyFolder(folder))
    return folder


def test_hostile_names_stay_text(hostile: Path) -> None:
    page = (hostile / "report.html").read_text(encoding="utf-8")
    elements = Elements(page)
    scripts = [attributes for tag, attributes in elements.tags if tag == "script"]
    assert [attributes for attributes in scripts if attributes.get("type") != "application/json"] == [{}]
    assert not [tag for tag, _ in elements.tags if tag in ("img", "iframe", "object", "link", "base", "form")]
    assert not [key for _, attributes in elements.tags for key in attributes if key.startswith("on")]
    assert "alert(1)" in "".join(elements.words)
    assert "\x00" not in page
    assert "\u202e" not in page


def test_hostile_names_break_no_drawing(hostile: Path) -> None:
    page = (hostile / "report.html").read_text(encoding="utf-8")
    drawings = list(svgs(page))
    assert len(drawings) == 2 * (len(FIGURES) + len(OF_AN_ARM))
    for drawing in drawings:
        tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(drawing).iter()}
        assert tags <= {"svg", "g", "path", "defs", "clipPath", "rect", "use", "text", "tspan", "title", "image"}
    assert HOSTILE in "".join(ET.fromstring(drawings[4]).itertext())  # the scores, a task's name


def test_no_csv_cell_is_a_formula(hostile: Path) -> None:
    files = list((hostile / "report").glob("*.csv"))
    assert {file.stem for file in files} >= FIGURES
    for file in files:
        with file.open(encoding="utf-8", newline="") as stream:
            for cell in (cell for row in csv.reader(stream) for cell in row):
                assert not cell.startswith(("=", "@", "+")), file
                assert not cell.startswith("-") or float(cell) <= 0
    assert rows_of(hostile, "alarms")[0]["tensor"] == "'@SUM(A1)"


def test_cells() -> None:
    made = table(("=a", "b"), [("-1+2", np.float32(-1.5)), ("\tx", float("nan")), ("ok", 3), (None, "x")])
    assert csv_text([made]).splitlines() == ["'=a,b", "'-1+2,-1.5", "\N{REPLACEMENT CHARACTER}x,", "ok,3", ",x"]
    assert [shown(cell) for cell in (None, 12345, -0.25, 1 / 3, "x")] == ["–", "12,345", "−0.25", "0.33333", "x"]


def test_arms_whose_names_fall_together_keep_their_own_files(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "x", Shape(steps=20, warmup=5, blocks=1, arms=("bf16", "a b", "a<b")))
    arms = read_study(StudyFolder(folder)).arms
    assert [figure_key("scale", arm, arms) for arm in arms] == ["scale-bf16", "scale-a_b-1", "scale-a_b-2"]


# ---- the file ----


def test_the_file_needs_nothing_else(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    elements = Elements(page)
    addresses = [
        value or ""
        for _, attributes in elements.tags
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href")
    ]
    assert all(
        address.startswith(("#", "report/", "data:image/png;base64,", "data:application/gzip;base64,"))
        for address in addresses
    )
    assert not re.search(r"url\((?!#)", page)
    policy = next(attributes["content"] for _, attributes in elements.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in str(policy)
    links = {address for address in addresses if address.startswith("report/")}
    assert links == {f"report/{file.name}" for file in (finished / "report").iterdir()}


def test_drawings_take_their_colours_from_the_style_sheet_and_share_no_ids(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert not [drawing for drawing in svgs(page) if re.search(r"[:\"]#[0-9a-fA-F]{3,6}[;\"]", drawing)]
    assert not [drawing for drawing in svgs(page) if re.search(r"\b(black|white)\b", drawing)]
    variables = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert variables <= set(re.findall(r"(--[\w-]+):", page))
    ids = [attributes["id"] for _, attributes in Elements(page).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_study_gives_the_same_page(smaller: Path, study: Path) -> None:
    assert page_of(study) == (smaller / "report.html").read_text(encoding="utf-8")


def test_a_page_of_182_linears_and_10_000_steps_is_below_the_limit(tmp_path: Path) -> None:
    shape = Shape(steps=10_000, warmup=500, blocks=26, arms=("bf16", "int8"))
    folder = write_study(tmp_path / "large", shape)
    page = write_page(StudyFolder(folder))
    assert page.stat().st_size < LIMIT
    rows = rows_of(folder, "saturation-int8")
    assert (len(rows), len(rows[0])) == (182 * 3, 1 + 198)


def test_ranges() -> None:
    assert ranges([7, 0, 1, 2, 3, 9, 10]) == "0–3, 7, 9–10"
    assert ranges([]) == ""
