"""Values looked at before they are quantized: what a histogram says of scales, advice that fits, and the verb."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_llama
from tiny_world import run_qatrun, write_world
from transformers import AutoModelForCausalLM, MixtralConfig

from qatrun.numerics import fake_quantize
from qatrun.quant import survey
from qatrun.quant.inspection import Spread, asymmetric, spreads
from qatrun.scheme import Scaling, Scheme, Slot
from qatrun.study.inspecting import _inspected

pytestmark = pytest.mark.usefixtures("datasets_cache", "one_thread")

INT8 = Scheme("int8", "per_tensor", 127.0, Scaling())
BY_TOKEN = Scheme("int8", "per_token", 127.0, Scaling(type="dynamic"))


def spread(x: torch.Tensor) -> Spread:
    return Spread.of(x, BY_TOKEN, channels_are_rows=False)


def decibels(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    return float(10 * torch.log10(x.square().sum() / (x - x_hat).square().sum()))


@pytest.mark.parametrize(("name", "target"), [("int8", 127.0), ("fp8_e4m3", 448.0), ("hif8", 15.0)])
def test_a_histogram_tells_the_error_of_any_scale(name: str, target: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 40) * torch.rand(2000, 1).exp2()
    scheme, seen = Scheme(name, "per_tensor", target, Scaling()), spread(x)
    for amax in (seen.amax, seen.amax / 2, seen.amax / 5):
        exact = decibels(x, fake_quantize(x, torch.tensor(amax / target), name))
        assert seen.sqnr_db(scheme, seen.fit(scheme, amax)) == pytest.approx(exact, abs=0.3)
    assert seen.share_beyond(seen.amax) == 0
    assert seen.share_beyond(2.0) == pytest.approx(float((x.abs() > 2).float().mean()), rel=1e-6)


def test_batches_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    x[3] = 0
    whole, parts = spread(x), spread(x[:20]).and_(spread(x[20:]))
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.channels, parts.channels)
    assert (whole.num_values, int(whole.num_zero), whole.amax) == (512, 8, parts.amax)
    assert whole.row_sqnr_db == pytest.approx(parts.row_sqnr_db)


def inspected(x: torch.Tensor, slot: str = "a:input") -> Any:
    return _inspected(Slot.parse(slot), spread(x), INT8)


def test_advice_fits_what_is_wrong() -> None:
    torch.manual_seed(0)
    plain = torch.randn(512, 64)
    assert inspected(plain).advice == []
    outliers = plain.clone()
    outliers[:, [5, 17]] *= 100
    found = inspected(outliers)
    assert sorted(found.outliers) == [5, 17]
    assert found.advice[0].startswith("outlier channels ")
    tokens = plain * torch.where(torch.arange(512) % 50 == 0, 40.0, 1.0)[:, None]
    assert inspected(tokens).advice[0].startswith("input: {granularity: per_token}: +")
    rare = torch.randn(8192, 64)
    rare[0, 0] = 25.0
    found = inspected(rare)
    assert found.best_amax < 15
    assert any(text.startswith("calibration: {input: mse}, amax ") for text in found.advice)


def test_a_zero_point_is_advised_where_values_lie_on_one_side() -> None:
    torch.manual_seed(0)
    x = torch.nn.functional.gelu(4 * torch.randn(512, 64))
    x[0, 0] = 150.0  # so that it keeps less than enough
    found = inspected(x)
    ranged = asymmetric(INT8)
    assert ranged is not None
    scale = (150.0 - float(x.min())) / 255
    zero = round(-128 - float(x.min()) / scale)
    assert found.zero_point == zero
    x_hat = ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale
    assert found.asymmetric_sqnr_db == pytest.approx(decibels(x, x_hat), abs=0.3)
    assert any(f"symmetric: false}}, zero-point {zero}: +" in text for text in found.advice)
    assert inspected(x, "a:weight").zero_point is None


def test_experts_are_tensors_of_their_own() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 101}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **more, use_cache=False)).eval()
    by_rows = {"input": BY_TOKEN, "weight": replace(BY_TOKEN, granularity="per_channel")}
    *_, found = spreads(model, survey(model), [torch.arange(32).view(2, 16)], by_rows)
    experts = "model.layers.0.mlp.experts"
    for index in range(4):
        weight = model.get_parameter(f"{experts}.down_proj")[index].detach()
        assert found[Slot(f"{experts}.down_proj.{index}", "weight")].amax == float(weight.abs().max())
    assert found[Slot(f"{experts}.gate_up_proj.0", "input")].num_values == 32 * 32


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspection")
    write_world(folder)
    model = tiny_llama(eos_token_id=0, bos_token_id=None)
    layer = model.model.layers[1]
    with torch.no_grad():  # the same function
        layer.post_attention_layernorm.weight[3] = 200.0
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[:, 3] /= 200.0
    model.save_pretrained(folder / "model")
    return folder


def test_the_verb_shows_every_tensor_worst_first(world: Path) -> None:
    ran = run_qatrun("inspect", "model", "--data=text.jsonl", "--output=seen", cwd=world)
    assert ran.code == 0, ran.err
    assert "model.layers.1.mlp.gate_proj:input" in ran.out
    found = json.loads((world / "seen/inspection.json").read_text())
    worst = found["tensors"][0]
    assert worst["tensor"] == "model.layers.1.mlp.gate_proj:input"
    assert worst["outliers"] == [3]
    assert worst["advice"][0].startswith("outlier channels 3, ")
    kept = [min(each["sqnr_db"], each["typical_sqnr_db"]) for each in found["tensors"]]
    assert kept == sorted(kept)
    assert worst["typical_sqnr_db"] < worst["sqnr_db"] - 6, "what the large channel hides"
    with (world / "seen/report/tensors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tensor"] for row in rows] == [each["tensor"] for each in found["tensors"]]
    assert len(rows) == 15 + 9, "a weight each, an input each group"
    page = (world / "seen/report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert "https://" not in page
    assert (world / "seen/report/histograms.csv").is_file()


MISTAKES = {
    "nope --data=text.jsonl": "model.path -- no model folder 'nope' here",
    "model --data=nope.jsonl": "--data no such file 'nope.jsonl'",
    "model --data=empty.jsonl": "--data empty.jsonl has no rows",
    "model --data=text.jsonl --format=int9": "--format: unknown format 'int9' (did you mean 'int8'?)",
    "model --data=text.jsonl --format=int4": "--format: unknown format 'int4': all formats have 8 bits (one of hif8, ",
    "model --data=text.jsonl --text-column=body": "--data ",
    "model --data=text.jsonl --output=text.jsonl": "text.jsonl is a file; give another --output",
    "model --data=text.jsonl --output=model": "model holds something else",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_what_is_refused_says_so_and_writes_nothing(world: Path, arguments: str) -> None:
    (world / "empty.jsonl").touch()
    before = set(world.rglob("*"))
    ran = run_qatrun("inspect", *arguments.split(), cwd=world)
    assert ran.code == 2
    assert MISTAKES[arguments] in ran.err
    assert "Traceback" not in ran.err
    assert set(world.rglob("*")) == before
